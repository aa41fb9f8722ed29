"use strict";
// One state, one draw(). Boxes and keypoints are px of the displayed picture, as in the HTTP contract.

const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), pen = canvas.getContext("2d");
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

// --- the picture -------------------------------------------------------------------------------

async function show(blob, name, boxes) {
  complain(null);
  let image;
  try {
    image = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    complain({ title: "This file cannot be shown", detail: `${name || "It"} is not a picture this browser knows. JPEG and PNG always work.` });
    return;
  }
  Object.assign(state, { blob, name, image, boxes: boxes || [], answer: null, person: 0, keypoint: -1 });
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
  const lowest = Number($("threshold").value);
  const person = state.answer?.results[0].persons[state.person];
  let text = "Drag a box around each person. Without a box the whole picture counts as one person.";
  if (state.boxes.length) text = "Drag to draw another box.";
  if (person && !person.keypoints.some(([, , score]) => score >= lowest)) {
    text = `No keypoint of this person scores above ${lowest.toFixed(2)}: move the slider down to see them all the same.`;
  }
  $("hint").textContent = text;
}

// --- drawing -----------------------------------------------------------------------------------

function draw() {
  if (!state.image) return;
  const scale = fit();
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.drawImage(state.image, 0, 0, canvas.width, canvas.height);
  const unit = Math.max(1, Math.min(canvas.width, canvas.height) / 420); // line width grows with the picture
  const boxes = state.drag ? [...state.boxes, boxOf(state.drag)] : state.boxes;
  boxes.forEach((box, i) => drawBox(box, i, scale, unit));
  if (state.answer) state.answer.results[0].persons.forEach((person, i) => drawPerson(person, i, scale, unit));
}

function drawBox([x, y, w, h], index, scale, unit) {
  const rect = [x * scale, y * scale, w * scale, h * scale];
  pen.lineWidth = 3.4 * unit;
  pen.strokeStyle = "rgba(0, 0, 0, .45)";
  pen.strokeRect(...rect);
  pen.lineWidth = 1.6 * unit;
  pen.strokeStyle = "#fff";
  pen.strokeRect(...rect);
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
  const { limbs } = state.model.skeleton;
  const lowest = Number($("threshold").value);
  const points = person.keypoints.map(([x, y, score]) => ({ x: x * scale, y: y * scale, on: score >= lowest }));
  const dim = state.answer.results[0].persons.length > 1 && index !== state.person;
  pen.globalAlpha = dim ? 0.72 : 1;
  pen.lineCap = "round";
  for (const outline of [true, false]) {
    for (const [a, b] of limbs) {
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

function limbColor(a, b) {
  // A limb of one side has its colour; one across the body, or to the head, the middle's.
  if (color(a) === color(b)) return color(a);
  const names = state.model.skeleton.keypoints;
  const middle = names.findIndex((name) => !/left|right/.test(name));
  return middle >= 0 ? color(middle) : color(a);
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
    const row = document.createElement("li");
    row.append(`${i + 1}`);
    box.forEach((value, part) => {
      const field = document.createElement("input");
      Object.assign(field, { type: "number", value: Math.round(value), step: 1 });
      field.setAttribute("aria-label", `box ${i + 1} ${labels[part]}`);
      field.addEventListener("input", () => {
        if (!Number.isFinite(field.valueAsNumber)) return;
        box[part] = field.valueAsNumber;
        state.answer = null;
        $("result").hidden = true;
        draw();
      });
      row.append(field);
    });
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `remove box ${i + 1}`);
    remove.addEventListener("click", () => {
      state.boxes.splice(i, 1);
      state.answer = null;
      refresh();
      $("add").focus();
    });
    row.append(remove);
    return row;
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
    const response = await fetch("v1/poses", { method: "POST", body: form });
    const body = await asJson(response);
    if (blob !== state.blob) return; // another picture meanwhile
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

async function asJson(response) {
  const text = await response.text();
  try {
    return JSON.parse(text);
  } catch { // a proxy's own words
    return { title: `The server answered ${response.status}`, detail: text.slice(0, 300) || response.statusText };
  }
}

function complain(problem) {
  const place = $("problem");
  place.hidden = !problem;
  if (!problem) return;
  const title = document.createElement("b"), small = document.createElement("small");
  title.textContent = problem.title || "Something went wrong";
  place.replaceChildren(title, problem.detail || "");
  if (problem.request_id) {
    small.textContent = `request ${problem.request_id}`;
    place.append(small);
  }
}

// --- the answer --------------------------------------------------------------------------------

function listPeople() {
  if (!state.answer) return;
  const [result] = state.answer.results;
  const whole = result.boxes_source === "whole_image";
  $("found").textContent = whole ? "The whole picture as one person" : `${result.persons.length} ${result.persons.length === 1 ? "person" : "people"}`;
  $("people").hidden = result.persons.length < 2;
  $("people").replaceChildren(...result.persons.map((person, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${i + 1} · ${person.score.toFixed(2)}`;
    button.setAttribute("aria-label", `person ${i + 1}, score ${person.score.toFixed(2)}`);
    button.setAttribute("aria-pressed", String(i === state.person));
    button.addEventListener("click", () => {
      state.person = i;
      state.keypoint = -1;
      refresh();
      $("people").children[i].focus();
    });
    return button;
  }));
  fillTable(result.persons[state.person]);
  const stages = { ...state.answer.timings_ms, "seen here": state.answer.seen_ms };
  $("timings").replaceChildren(...Object.entries(stages).map(([name, ms]) => {
    const pair = document.createElement("div"), term = document.createElement("dt"), value = document.createElement("dd");
    term.textContent = name;
    value.textContent = `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
    pair.append(term, value);
    return pair;
  }));
}

function fillTable(person) {
  const lowest = Number($("threshold").value);
  const rows = !person ? [] : person.keypoints.map(([x, y, score], k) => {
    const row = document.createElement("tr");
    row.classList.toggle("low", score < lowest);
    const name = document.createElement("th"), dot = document.createElement("span");
    name.scope = "row";
    dot.className = "dot";
    dot.style.background = color(k);
    name.append(dot, state.model.skeleton.keypoints[k].replaceAll("_", " "));
    row.append(name);
    for (const value of [x.toFixed(1), y.toFixed(1), score.toFixed(2)]) {
      const cell = document.createElement("td");
      cell.textContent = value;
      row.append(cell);
    }
    const bar = document.createElement("span"), fill = document.createElement("i");
    bar.className = "bar";
    fill.style.width = `${100 * clamp(score, 0, 1)}%`;
    bar.append(fill);
    row.lastChild.append(bar);
    const point = (on) => () => {
      state.keypoint = on ? k : -1;
      draw();
    };
    row.addEventListener("pointerenter", point(true));
    row.addEventListener("pointerleave", point(false));
    return row;
  });
  $("table").tBodies[0].replaceChildren(...rows);
}

$("threshold").addEventListener("input", () => {
  $("level").textContent = Number($("threshold").value).toFixed(2);
  if (!state.answer) return;
  fillTable(state.answer.results[0].persons[state.person]);
  hint();
  draw();
});

function save(blob, suffix) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${(state.name || "photo").replace(/\.[^.]*$/, "")}${suffix}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
$("save").addEventListener("click", () => canvas.toBlob((blob) => save(blob, "-poses.png")));
$("json").addEventListener("click", () => {
  const { seen_ms, ...answer } = state.answer;
  save(new Blob([JSON.stringify(answer, null, 2)], { type: "application/json" }), "-poses.json");
});

// --- choosing and dropping ---------------------------------------------------------------------

$("other").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) show(file, file.name, []);
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
  const [file] = event.dataTransfer.files;
  if (file) show(file, file.name, []);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) show(file, file.name, []);
});
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
  const { name, version, codec, input_size: [width, height], mode, flip_test, skeleton } = state.model;
  const title = document.createElement("b");
  title.textContent = [name, version].filter(Boolean).join(" ");
  $("model").replaceChildren(title, ` · ${height}×${width} · ${codec.name} · ${mode}${flip_test ? " · flip test" : ""}`);
  const sides = [["left", /left/], ["right", /right/], ["middle", /^(?!.*(left|right))/]];
  $("legend").replaceChildren(...sides.flatMap(([side, pattern]) => {
    const k = skeleton.keypoints.findIndex((keypoint) => pattern.test(keypoint));
    if (k < 0) return [];
    const entry = document.createElement("span"), dot = document.createElement("span");
    dot.className = "dot";
    dot.style.background = color(k);
    entry.append(dot, side === "middle" ? side : `the person's ${side}`);
    return [entry];
  }));
}

function asSample({ name, boxes }) {
  const button = document.createElement("button"), image = document.createElement("img");
  const url = `samples/${encodeURIComponent(name)}`;
  button.type = "button";
  image.src = url;
  image.alt = `sample ${name}, ${boxes ? boxes.length : "no"} ${boxes && boxes.length === 1 ? "box" : "boxes"}`;
  image.loading = "lazy";
  button.append(image);
  button.addEventListener("click", async () => {
    const blob = await fetch(url).then((r) => r.blob());
    await show(blob, name, boxes ? boxes.map((box) => [...box]) : []);
    await find();
  });
  return button;
}

start();
