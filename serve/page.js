"use strict";
// One state, one draw(). Boxes and keypoints are px of the displayed picture, as in the HTTP contract.

const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), pen = canvas.getContext("2d");

function element(tag, properties, ...content) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...content);
  return made;
}

const state = {
  model: null,      // of /v1/models
  blob: null,       // the picture's bytes, sent as they are
  name: "",
  image: null,      // ImageBitmap as displayed: EXIF applied
  boxes: [],        // [x, y, w, h]
  answer: null,     // of /v1/poses
  person: 0,        // shown in the table
  keypoint: -1,     // pointed at in the table
  drag: null,       // a box being drawn
};
const persons = () => state.answer?.results[0].persons ?? [];
const lowest = () => Number($("threshold").value);

// --- the picture -------------------------------------------------------------------------------

async function show(blob, name, boxes = []) {
  complain(null);
  let image;
  try {
    image = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    complain({ title: "This file cannot be shown", detail: `${name || "It"} is not a picture this browser knows. JPEG and PNG always work.` });
    return;
  }
  Object.assign(state, { blob, name, image, boxes, answer: null, person: 0, keypoint: -1 });
  $("drop").hidden = true;
  canvas.hidden = $("actions").hidden = $("hint").hidden = false;
  refresh();
}

function fit() {
  // The canvas takes the width it has, but never more than 72 % of the window's height.
  const wide = $("stage").clientWidth, high = Math.max(260, window.innerHeight * 0.72);
  const scale = Math.min(wide / state.image.width, high / state.image.height);
  const sharp = window.devicePixelRatio || 1;
  canvas.style.width = `${state.image.width * scale}px`;
  canvas.style.height = `${state.image.height * scale}px`;
  canvas.width = Math.round(state.image.width * scale * sharp);
  canvas.height = Math.round(state.image.height * scale * sharp);
  return scale * sharp; // canvas px of a picture px
}

function refresh() {
  listBoxes();
  listPeople();
  const poses = state.answer !== null;
  $("boxes").hidden = state.boxes.length === 0;
  $("result").hidden = !poses;
  $("clear").disabled = state.boxes.length === 0 && !poses;
  $("find").textContent = state.boxes.length > 1 ? `Find ${state.boxes.length} poses` : "Find the pose";
  hint();
  draw();
}

function hint() {
  const person = persons()[state.person];
  let text = "Drag a box around each person. Without a box the whole picture counts as one person.";
  if (state.boxes.length) text = "Drag to draw another box.";
  if (person && !person.keypoints.some(([, , score]) => score >= lowest())) {
    text = `No keypoint of this person scores above ${lowest().toFixed(2)}: move the slider down to see them all the same.`;
  }
  $("hint").textContent = text;
}

// --- drawing -----------------------------------------------------------------------------------

function draw() {
  if (!state.image) return;
  const scale = fit();
  pen.drawImage(state.image, 0, 0, canvas.width, canvas.height);
  const unit = Math.max(1, Math.min(canvas.width, canvas.height) / 420); // line width grows with the picture
  const boxes = state.drag ? [...state.boxes, boxOf(state.drag)] : state.boxes;
  boxes.forEach((box, i) => drawBox(box, i, scale, unit));
  persons().forEach((person, i) => drawPerson(person, i, scale, unit));
}

function drawBox([x, y, w, h], index, scale, unit) {
  const rect = [x * scale, y * scale, w * scale, h * scale];
  for (const [width, style] of [[3.4, "rgba(0, 0, 0, .45)"], [1.6, "#fff"]]) {
    pen.lineWidth = width * unit;
    pen.strokeStyle = style;
    pen.strokeRect(...rect);
  }
  const size = 11 * unit;
  pen.font = `600 ${size}px system-ui, sans-serif`;
  pen.fillStyle = "rgba(0, 0, 0, .62)";
  pen.fillRect(rect[0], rect[1], size * 1.5, size * 1.5);
  pen.fillStyle = "#fff";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.fillText(String(index + 1), rect[0] + size * 0.75, rect[1] + size * 0.78);
}

function drawPerson(person, index, scale, unit) {
  const points = person.keypoints.map(([x, y, score]) => ({ x: x * scale, y: y * scale, on: score >= lowest() }));
  pen.globalAlpha = index === state.person ? 1 : 0.72;
  pen.lineCap = "round";
  for (const outline of [true, false]) {
    for (const [a, b] of state.model.skeleton.limbs) {
      if (!points[a].on || !points[b].on) continue;
      pen.lineWidth = (outline ? 4.6 : 2.6) * unit;
      pen.strokeStyle = outline ? "rgba(0, 0, 0, .5)" : limbColor(a, b);
      pen.beginPath();
      pen.moveTo(points[a].x, points[a].y);
      pen.lineTo(points[b].x, points[b].y);
      pen.stroke();
    }
  }
  points.forEach((point, k) => {
    const pointed = index === state.person && k === state.keypoint;
    if (!point.on && !pointed) return;
    pen.beginPath();
    pen.arc(point.x, point.y, (pointed ? 6 : 3) * unit, 0, 2 * Math.PI);
    pen.fillStyle = color(k);
    pen.fill();
    pen.lineWidth = (pointed ? 2 : 1) * unit;
    pen.strokeStyle = pointed ? "#fff" : "rgba(0, 0, 0, .65)";
    pen.stroke();
  });
  pen.globalAlpha = 1;
}

const color = (k) => `rgb(${state.model.skeleton.palette[k].join(",")})`;
const dot = (k) => element("span", { className: "dot", style: `background: ${color(k)}` });
const SIDES = { left: /left/, right: /right/, middle: /^(?!.*(left|right))/ };
const firstOf = (side) => state.model.skeleton.keypoints.findIndex((name) => SIDES[side].test(name));

function limbColor(a, b) {
  // A limb of one side has its colour; one across the body, or to the head, the middle's.
  const middle = firstOf("middle");
  return color(color(a) === color(b) || middle < 0 ? a : middle);
}

// --- boxes: by pointer, and by number fields ---------------------------------------------------

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function at(event) {
  const frame = canvas.getBoundingClientRect();
  return {
    x: clamp(((event.clientX - frame.left) / frame.width) * state.image.width, 0, state.image.width),
    y: clamp(((event.clientY - frame.top) / frame.height) * state.image.height, 0, state.image.height),
  };
}

function boxOf({ from, to }) {
  return [Math.min(from.x, to.x), Math.min(from.y, to.y), Math.abs(to.x - from.x), Math.abs(to.y - from.y)];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || !state.image) return;
  canvas.setPointerCapture(event.pointerId);
  state.drag = { from: at(event), to: at(event) };
});
canvas.addEventListener("pointermove", (event) => {
  if (!state.drag) return;
  state.drag.to = at(event);
  draw();
});
canvas.addEventListener("pointerup", (event) => {
  if (!state.drag) return;
  state.drag.to = at(event);
  const box = boxOf(state.drag).map((v) => Math.round(v));
  state.drag = null;
  const smallest = Math.max(4, Math.min(state.image.width, state.image.height) / 60);
  if (box[2] >= smallest && box[3] >= smallest) addBox(box);
  else draw(); // a click, not a box
});
canvas.addEventListener("pointercancel", () => {
  state.drag = null;
  draw();
});

function addBox(box) {
  state.boxes.push(box);
  state.answer = null;
  $("boxes").open = true;
  refresh();
}

function listBoxes() {
  const labels = ["x", "y", "width", "height"];
  $("boxlist").replaceChildren(...state.boxes.map((box, i) => {
    const fields = box.map((value, part) => element("input", {
      type: "number", value: Math.round(value), step: 1, ariaLabel: `box ${i + 1} ${labels[part]}`,
      oninput({ target }) {
        if (!Number.isFinite(target.valueAsNumber)) return;
        box[part] = target.valueAsNumber;
        state.answer = null;
        $("result").hidden = true;
        draw();
      },
    }));
    const remove = () => {
      state.boxes.splice(i, 1);
      state.answer = null;
      refresh();
      $("add").focus();
    };
    const button = element("button", { type: "button", ariaLabel: `remove box ${i + 1}`, onclick: remove }, "×");
    return element("li", {}, `${i + 1}`, ...fields, button);
  }));
}

$("add").addEventListener("click", () => {
  const { width, height } = state.image;
  addBox([width * 0.25, height * 0.1, width * 0.5, height * 0.8].map(Math.round));
  $("boxlist").lastChild.querySelector("input").focus();
});
$("clear").addEventListener("click", () => {
  Object.assign(state, { boxes: [], answer: null });
  complain(null);
  refresh();
});

// --- asking ------------------------------------------------------------------------------------

$("find").addEventListener("click", find);

async function find() {
  const button = $("find");
  if (button.disabled) return;
  const form = new FormData();
  form.append("image", state.blob, state.name || "photo");
  if (state.boxes.length) form.append("boxes", JSON.stringify(state.boxes));
  button.disabled = true;
  button.textContent = "Looking …";
  complain(null);
  const asked = performance.now(), blob = state.blob;
  try {
    const response = await fetch("v1/poses", { method: "POST", body: form, headers: authorized() });
    const body = await asJson(response);
    if (blob !== state.blob) return; // another picture meanwhile
    if (response.status === 401) $("keyfield").hidden = false;
    if (!response.ok) complain(body);
    else {
      body.seen_ms = performance.now() - asked;
      Object.assign(state, { answer: body, person: 0, keypoint: -1 });
      $("boxes").open = false; // the poses matter now
    }
  } catch {
    complain({ title: "The server does not answer", detail: "Is it still running? Try again in a moment." });
  } finally {
    button.disabled = false;
    refresh();
    if (state.answer) $("found").focus({ preventScroll: window.innerWidth > 820 });
  }
}

// Where the endpoint asks for a key: typed once, kept until the tab is closed.
function authorized() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value.trim());
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

function complain(problem) {
  $("problem").hidden = !problem;
  if (!problem) return;
  const request = problem.request_id ? element("small", {}, `request ${problem.request_id}`) : "";
  $("problem").replaceChildren(element("b", {}, problem.title || "Something went wrong"), problem.detail || "", request);
}

// --- the answer --------------------------------------------------------------------------------

function listPeople() {
  if (!state.answer) return;
  const count = persons().length, whole = state.answer.results[0].boxes_source === "whole_image";
  $("found").textContent = whole ? "The whole picture as one person" : `${count} ${count === 1 ? "person" : "people"}`;
  $("people").hidden = count < 2;
  $("people").replaceChildren(...persons().map((person, i) => {
    const score = person.score.toFixed(2);
    const choose = () => {
      Object.assign(state, { person: i, keypoint: -1 });
      refresh();
      $("people").children[i].focus();
    };
    const aria = { ariaLabel: `person ${i + 1}, score ${score}`, ariaPressed: String(i === state.person) };
    return element("button", { type: "button", onclick: choose, ...aria }, `${i + 1} · ${score}`);
  }));
  fillTable();
  const stages = { ...state.answer.timings_ms, "seen here": state.answer.seen_ms };
  $("timings").replaceChildren(...Object.entries(stages).map(([name, ms]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, `${ms.toFixed(ms < 10 ? 1 : 0)} ms`))));
}

function fillTable() {
  const point = (k) => () => {
    state.keypoint = k;
    draw();
  };
  const rows = persons()[state.person]?.keypoints.map(([x, y, score], k) => {
    const name = element("th", { scope: "row" }, dot(k), state.model.skeleton.keypoints[k].replaceAll("_", " "));
    const bar = element("span", { className: "bar" }, element("i", { style: `width: ${100 * clamp(score, 0, 1)}%` }));
    const cells = [[x.toFixed(1)], [y.toFixed(1)], [score.toFixed(2), bar]].map((cell) => element("td", {}, ...cell));
    const properties = { className: score < lowest() ? "low" : "", onpointerenter: point(k), onpointerleave: point(-1) };
    return element("tr", properties, name, ...cells);
  });
  $("table").tBodies[0].replaceChildren(...(rows ?? []));
}

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
$("save").addEventListener("click", () => canvas.toBlob((blob) => save(blob, "-poses.png")));
$("json").addEventListener("click", () => {
  const { seen_ms, ...answer } = state.answer;
  save(new Blob([JSON.stringify(answer, null, 2)], { type: "application/json" }), "-poses.json");
});

// --- choosing and dropping ---------------------------------------------------------------------

const showFirst = ([file]) => file && show(file, file.name);
$("other").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  showFirst($("file").files);
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
  showFirst(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => showFirst(event.clipboardData.files));
window.addEventListener("resize", draw);

// --- start -------------------------------------------------------------------------------------

async function start() {
  $("curl").textContent = `curl -F image=@photo.jpg -F 'boxes=[[x, y, w, h]]' ${new URL("v1/poses", location.href)}`;
  try {
    const response = await fetch("v1/models");
    const body = await asJson(response);
    if (!response.ok || !body.models.length) throw body;
    [state.model] = body.models;
    tellModel();
  } catch (problem) {
    $("model").textContent = "no model is ready";
    complain(problem instanceof Error ? { title: "The server does not answer", detail: "Reload the page in a moment." } : problem);
    return;
  }
  const samples = await fetch("samples").then((r) => r.json()).catch(() => []);
  $("samples").hidden = samples.length === 0;
  $("samplelist").replaceChildren(...samples.map(asSample));
}

function tellModel() {
  const { name, version, codec, input_size: [width, height], mode, flip_test } = state.model;
  const title = element("b", {}, [name, version].filter(Boolean).join(" "));
  $("model").replaceChildren(title, ` · ${height}×${width} · ${codec.name} · ${mode}${flip_test ? " · flip test" : ""}`);
  const sides = Object.keys(SIDES).filter((side) => firstOf(side) >= 0);
  $("legend").replaceChildren(...sides.map((side) =>
    element("span", {}, dot(firstOf(side)), side === "middle" ? side : `the person's ${side}`)));
}

function asSample({ name, boxes }) {
  const src = `samples/${encodeURIComponent(name)}`;
  const alt = `sample ${name}, ${boxes ? boxes.length : "no"} ${boxes?.length === 1 ? "box" : "boxes"}`;
  const choose = async () => {
    const blob = await fetch(src).then((r) => r.blob());
    await show(blob, name, structuredClone(boxes ?? []));
    await find();
  };
  return element("button", { type: "button", onclick: choose }, element("img", { src, alt, loading: "lazy" }));
}

start();
