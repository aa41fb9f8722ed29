// The page: choosing a picture, asking for its poses, showing them.

import { editBoxes, listBoxes, pick } from "./boxes.js";
import { $, canvas, clamp, current, dot, draw, element, fullSize, legend, lowest, persons, shownScale, state } from "./picture.js";

// --- the picture -------------------------------------------------------------------------------

async function show(blob, name, boxes = []) {
  let image;
  try {
    image = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    const detail = `${name || "It"} is not a picture this browser knows. JPEG and PNG always work.`;
    complain({ title: "This file cannot be shown", detail });
    return false;
  }
  Object.assign(state, { blob, name, image, boxes, chosen: boxes.length === 1 ? 0 : -1, drag: null });
  $("drop").hidden = true;
  $("picture").hidden = $("actions").hidden = $("hint").hidden = false;
  changed();
  return true;
}

// The picture or its boxes are other ones: what was asked and said of the old ones is over.
function changed() {
  asked?.abort();
  asked = null;
  Object.assign(state, { answer: null, keypoint: -1 });
  $("boxes").open = true;
  complain(null);
  refresh();
}

function refresh() {
  listBoxes();
  listPeople();
  const poses = state.answer !== null;
  $("boxes").hidden = state.boxes.length === 0;
  $("result").hidden = !poses;
  $("clear").disabled = state.boxes.length === 0 && !poses;
  const count = state.boxes.length, one = state.model?.detector && !count ? "Find the people" : "Find the pose";
  $("find").textContent = asked ? "Looking …" : count > 1 ? `Find ${count} poses` : one;
  hint();
  draw();
}

function hint() {
  const person = persons()[current()];
  let text = "Drag a box around each person. Without a box the whole picture counts as one person.";
  if (state.model?.detector) text = "People are found in the picture. Drag boxes to say yourself who is meant.";
  if (state.answer) text = "Drag a box around a person who was missed.";
  if (state.boxes.length) text = "Click a box to pick it; drag to draw another.";
  if (state.boxes[state.chosen]) {
    const [x, y, w, h] = state.boxes[state.chosen].map(Math.round);
    text = `Box ${state.chosen + 1} of ${state.boxes.length}, ${w} × ${h} at ${x}, ${y}: drag it to move it, its edges to size it.`;
  }
  if (person && !person.keypoints.some(([, , score]) => score >= lowest())) {
    text = `No keypoint of this person scores above ${lowest().toFixed(2)}: move the slider down to see them all the same.`;
  }
  $("hint").textContent = text;
}

$("clear").addEventListener("click", () => {
  Object.assign(state, { boxes: [], chosen: -1 });
  changed();
});

// --- asking ------------------------------------------------------------------------------------

let asked = null; // the request under way

async function find() {
  if (asked || !state.blob) return;
  const form = new FormData(), mine = new AbortController();
  form.append("image", state.blob, state.name || "photo");
  if (state.boxes.length) form.append("boxes", JSON.stringify(state.boxes));
  asked = mine;
  complain(null);
  refresh();
  const started = performance.now(), { signal } = mine;
  let problem = null;
  try {
    const response = await fetch("v1/poses", { method: "POST", body: form, headers: authorized(), signal });
    const body = await asJson(response);
    if (response.ok) {
      if (body.model.sha256 !== state.model?.sha256) await learnModel(); // another one since
      signal.throwIfAborted();
      Object.assign(state, { answer: { ...body, seen_ms: performance.now() - started }, keypoint: -1, chosen: -1 });
      // Found boxes are as good as drawn ones: to be picked, moved and asked about again.
      if (body.results[0].boxes_source === "detector") state.boxes = persons().map(({ bbox }) => [...bbox]);
    } else problem = body;
    if (!signal.aborted) $("keyfield").hidden = response.status !== 401;
  } catch {
    problem = { title: "The server does not answer", detail: "Is it still running? Try again in a moment." };
  }
  if (signal.aborted) return; // of a picture, or of boxes, that are not shown any more
  asked = null;
  if (problem) complain(problem);
  else $("boxes").open = false; // the poses matter now
  refresh();
  if (!$("keyfield").hidden) $("key").focus();
  else if (state.answer) $("found").focus({ preventScroll: true });
}
$("find").addEventListener("click", find);

// Where the endpoint asks for a key: typed once, kept until the tab is closed (where the browser keeps anything).
let key = "";
try {
  key = sessionStorage.getItem("key") ?? "";
} catch { /* it keeps nothing */ }
const authorized = () => (key ? { Authorization: `Bearer ${key}` } : {});

$("keyfield").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(typed)) {
    complain({ title: "This is no key", detail: "A key is letters, digits and signs, without a space." });
    return;
  }
  key = typed;
  try {
    sessionStorage.setItem("key", key);
  } catch { /* typed again after a reload */ }
  find();
});

async function asJson(response) {
  const text = await response.text();
  try {
    return JSON.parse(text);
  } catch { // a proxy's own words
    return { title: `The server answered ${response.status}`, detail: text.slice(0, 300) || response.statusText };
  }
}

function complain(problem, note = false) {
  $("problem").hidden = !problem;
  if (!problem) return;
  $("problem").className = note ? "note" : "";
  const request = problem.request_id ? element("small", {}, `request ${problem.request_id}`) : "";
  $("problem").replaceChildren(element("b", {}, problem.title || "Something went wrong"), problem.detail || "", request);
}

// --- the answer --------------------------------------------------------------------------------

function listPeople() {
  if (!state.answer) return;
  const count = persons().length, { boxes_source: source, warnings } = state.answer.results[0];
  const people = `${count} ${count === 1 ? "person" : "people"}`;
  const found = count ? `${people} found` : "Nobody was found";
  $("found").textContent = { whole_image: "The whole picture as one person", detector: found }[source] ?? people;
  $("people").hidden = count < 2;
  const focused = [...$("people").children].indexOf(document.activeElement);
  $("people").replaceChildren(...persons().map((person, i) => {
    const score = person.score.toFixed(2);
    const pressed = String(i === current());
    return element("button", { type: "button", onclick: () => pick(i), ariaPressed: pressed }, `${i + 1} · ${score}`);
  }));
  $("people").children[focused]?.focus();
  fillTable();
  $("warning").textContent = (warnings ?? []).join(" ");
  const stages = { ...state.answer.timings_ms, "seen here": state.answer.seen_ms };
  $("timings").replaceChildren(...Object.entries(stages).map(([name, ms]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, `${ms.toFixed(ms < 10 ? 1 : 0)} ms`))));
}

// A row for each keypoint; one of them takes the focus, arrows go on from it.
function fillTable() {
  const rows = persons()[current()]?.keypoints.map(([x, y, score], k) => {
    const name = element("th", { scope: "row" }, dot(k), state.model.skeleton.keypoints[k].replaceAll("_", " "));
    const bar = element("span", { className: "bar" }, element("i", { style: `width: ${100 * clamp(score, 0, 1)}%` }));
    const cells = [[x.toFixed(1)], [y.toFixed(1)], [score.toFixed(2), bar]].map((cell) => element("td", {}, ...cell));
    const show = () => point(k), hide = () => point(-1), click = ({ currentTarget }) => currentTarget.focus();
    const events = { onpointerenter: show, onpointerleave: hide, onfocus: show, onblur: hide, onclick: click };
    return element("tr", { className: score < lowest() ? "low" : "", tabIndex: k ? -1 : 0, ...events }, name, ...cells);
  });
  $("table").tBodies[0].replaceChildren(...(rows ?? []));
}

function point(k) {
  if (state.keypoint === k) return;
  state.keypoint = k;
  [...$("table").tBodies[0].rows].forEach((row, i) => row.classList.toggle("on", i === k));
  draw();
}

$("table").addEventListener("keydown", (event) => {
  const rows = [...$("table").tBodies[0].rows], now = rows.indexOf(document.activeElement);
  const to = { ArrowUp: now - 1, ArrowDown: now + 1, Home: 0, End: rows.length - 1 }[event.key];
  if (now < 0 || !rows[to]) return;
  event.preventDefault();
  [rows[now].tabIndex, rows[to].tabIndex] = [-1, 0];
  rows[to].focus();
});

// The keypoint of the person in the table that the mouse is near.
canvas.addEventListener("pointermove", (event) => {
  if (state.drag || !state.answer || event.pointerType !== "mouse") return;
  const scale = shownScale(), near = persons()[current()]?.keypoints.map(([x, y, score], k) =>
    [score < lowest() ? Infinity : Math.hypot(x * scale - event.offsetX, y * scale - event.offsetY), k]);
  const [far, k] = near?.sort(([a], [b]) => a - b)[0] ?? [Infinity, -1];
  point(far < 10 ? k : -1);
});

$("threshold").addEventListener("input", () => {
  $("level").textContent = lowest().toFixed(2);
  fillTable();
  hint();
  draw();
});

function save(blob, suffix) {
  const href = URL.createObjectURL(blob);
  element("a", { href, download: `${(state.name || "photo").replace(/\.[^.]*$/, "")}${suffix}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}
$("save").addEventListener("click", () => fullSize().toBlob((blob) => save(blob, "-poses.png")));
$("json").addEventListener("click", () => {
  const { seen_ms, ...answer } = state.answer;
  save(new Blob([JSON.stringify(answer, null, 2)], { type: "application/json" }), "-poses.json");
});

// --- choosing, dropping, pasting ---------------------------------------------------------------

// What was handed over, or what to do instead. `items` tell a folder from a file, and a link from nothing.
async function take(files, items = []) {
  const [file] = files, of = (kind) => [...items].some((item) => item.kind === kind);
  if ([...items].some((item) => item.webkitGetAsEntry?.()?.isDirectory)) {
    complain({ title: "This is a folder", detail: "Drop one photo. For many: python -m serve.client URL FILES." });
  } else if (file) {
    if (await show(file, file.name) && files.length > 1) {
      const detail = `${file.name} is shown. For many at once: python -m serve.client URL FILES.`;
      complain({ title: `${files.length} files: one at a time here`, detail }, true);
    }
  } else if (of("string")) {
    const detail = "Nothing is fetched from the web here: save the picture and drop the file, or copy the picture itself and paste it.";
    complain({ title: "This is an address or text, not a photo", detail });
  }
}

for (const button of ["drop", "other"]) $(button).addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  await take([...$("file").files]);
  $("file").value = ""; // the same file again is a change, too
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("stage").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("stage").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  take([...event.dataTransfer.files], event.dataTransfer.items);
});
document.addEventListener("paste", (event) => {
  const { files, items } = event.clipboardData;
  if (files.length || !event.target.matches?.("input")) take([...files], items);
});
window.addEventListener("resize", draw);

// --- start -------------------------------------------------------------------------------------

async function learnModel() {
  const response = await fetch("v1/models", { headers: authorized() });
  const body = await asJson(response);
  if (!response.ok || !body.models.length) throw body;
  [state.model] = body.models;
  const { name, version, codec, input_size: [width, height], mode, flip_test, detector } = state.model;
  const title = element("b", {}, [name, version].filter(Boolean).join(" "));
  $("model").replaceChildren(title, ` · ${height}×${width} · ${codec.name} · ${mode}${flip_test ? " · flip test" : ""}${detector ? ` · people by ${detector.name}` : ""}`);
  const boxes = detector ? "" : "-F 'boxes=[[x, y, w, h]]' ";
  $("curl").textContent = `curl -F image=@photo.jpg ${boxes}${new URL("v1/poses", location.href)}`;
  $("legend").replaceChildren(...legend());
}

async function start() {
  try {
    await learnModel();
    $("problem").hidden ||= $("problem").classList.contains("waiting");
  } catch (problem) {
    const away = { title: "The server does not answer", detail: "The page looks again every few seconds." };
    $("model").textContent = "no model is ready";
    complain(problem instanceof Error ? away : problem);
    $("problem").classList.add("waiting");
    setTimeout(start, 3000);
    return;
  }
  const samples = await fetch("samples").then((r) => r.json()).catch(() => []);
  $("samples").hidden = samples.length === 0;
  $("samplelist").replaceChildren(...samples.map(asSample));
}

function asSample({ name, boxes }) {
  const src = `samples/${encodeURIComponent(name)}`;
  const alt = `sample ${name}, ${boxes ? boxes.length : "no"} ${boxes?.length === 1 ? "box" : "boxes"}`;
  const choose = async () => {
    const response = await fetch(src).catch(() => null);
    if (!response?.ok) return complain({ title: "The sample is not there", detail: "Reload the page in a moment." });
    if (await show(await response.blob(), name, structuredClone(boxes ?? []))) find();
  };
  return element("button", { type: "button", onclick: choose }, element("img", { src, alt, loading: "lazy", draggable: false }));
}

editBoxes(changed, refresh);
start();
