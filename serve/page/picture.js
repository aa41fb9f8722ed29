// What the page knows, and how it is drawn. Boxes and keypoints are px of the displayed picture, as in the HTTP contract.

export const $ = (id) => document.getElementById(id);
export const canvas = $("canvas");

export const state = {
  model: null,      // of /v1/models
  blob: null,       // the picture's bytes, sent as they are
  name: "",
  image: null,      // ImageBitmap as displayed: EXIF applied
  boxes: [],        // [x, y, w, h]
  chosen: -1,       // the box that is picked, and its person; -1: none
  answer: null,     // of /v1/poses
  keypoint: -1,     // pointed at
  drag: null,       // what the pointer is doing (boxes.js); its box is shown in place of the old one
};
export const persons = () => state.answer?.results[0].persons ?? [];
export const current = () => Math.max(state.chosen, 0); // the person in the table
export const lowest = () => Number($("threshold").value);
export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

export function element(tag, properties, ...content) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...content);
  return made;
}

// CSS px of a picture px. The canvas takes the width it has and most of the window's height; on a phone, once there are
// poses, less of it, so that the table is seen with the picture.
function fit() {
  const narrow = window.innerWidth <= 820;
  const high = Math.max(200, window.innerHeight * (narrow ? (state.answer ? 0.42 : 0.6) : 0.72));
  return Math.min($("stage").clientWidth / state.image.width, high / state.image.height);
}

export const shownScale = () => canvas.clientWidth / state.image.width;

export function draw() {
  if (!state.image) return;
  const { width, height } = state.image, css = fit(), sharp = window.devicePixelRatio || 1;
  canvas.style.width = `${width * css}px`;
  canvas.style.height = `${height * css}px`;
  canvas.width = Math.round(width * css * sharp);
  canvas.height = Math.round(height * css * sharp);
  paint(canvas, sharp * clamp(Math.min(width, height) * css / 420, 1, 2), true);
  placeRemove(css);
}

// The picture as large as it is, without the marks of a picked box.
export function fullSize() {
  const scale = Math.min(1, 4096 / Math.max(state.image.width, state.image.height));
  const paper = document.createElement("canvas");
  paper.width = Math.round(state.image.width * scale);
  paper.height = Math.round(state.image.height * scale);
  paint(paper, Math.max(1, Math.min(paper.width, paper.height) / 420), false);
  return paper;
}

function paint(paper, unit, marks) {
  const pen = paper.getContext("2d"), scale = paper.width / state.image.width;
  pen.drawImage(state.image, 0, 0, paper.width, paper.height);
  const boxes = shownBoxes();
  boxes.forEach((box, i) => drawBox(pen, box.map((v) => v * scale), marks && i === state.chosen, unit));
  persons().forEach((person, i) => drawPerson(pen, person, i, scale, unit));
  drawNumbers(pen, boxes.map((box) => box.map((v) => v * scale)), scale, unit);
}

function shownBoxes() {
  if (!state.drag?.box) return state.boxes;
  if (state.drag.kind === "new") return [...state.boxes, state.drag.box];
  return state.boxes.map((box, i) => (i === state.chosen ? state.drag.box : box));
}

function drawBox(pen, [x, y, w, h], picked, unit) {
  for (const [width, style] of [[3.4, "rgba(0, 0, 0, .55)"], [picked ? 2.2 : 1.4, "#fff"]]) {
    pen.lineWidth = width * unit;
    pen.strokeStyle = style;
    pen.strokeRect(x, y, w, h);
  }
  if (!picked) return;
  const side = 9 * unit;
  for (const px of [x, x + w / 2, x + w]) {
    for (const py of [y, y + h / 2, y + h]) {
      if (px === x + w / 2 && py === y + h / 2) continue;
      pen.fillStyle = "#fff";
      pen.fillRect(px - side / 2, py - side / 2, side, side);
      pen.lineWidth = 1.5 * unit;
      pen.strokeStyle = "#1268c4";
      pen.strokeRect(px - side / 2, py - side / 2, side, side);
    }
  }
}

function drawNumbers(pen, boxes, scale, unit) {
  const size = 18 * unit;
  pen.font = `600 ${11 * unit}px system-ui, sans-serif`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  placeNumbers(boxes, boxes.map((box, i) => headOf(box, i, scale)), size, pen.canvas).forEach(([x, y], i) => {
    pen.fillStyle = i === state.chosen ? "#1268c4" : "rgba(0, 0, 0, .75)";
    pen.fillRect(x, y, size, size);
    pen.fillStyle = "#fff";
    pen.fillText(String(i + 1), x + size / 2, y + size * 0.53);
  });
}

// Where a face is: by its keypoints, else the middle of the box's top.
function headOf([x, y, w, h], index, scale) {
  const points = (persons()[index]?.keypoints ?? [])
    .filter(([, , score], k) => score >= 0.2 && /nose|eye|ear|head|chin/.test(state.model.skeleton.keypoints[k]));
  if (!points.length) return [x + w / 4, y, w / 2, h / 4];
  const xs = points.map(([px]) => px * scale), ys = points.map(([, py]) => py * scale);
  const left = Math.min(...xs), top = Math.min(...ys), wide = Math.max(...xs) - left, high = Math.max(...ys) - top;
  const round = Math.max(wide, high, Math.min(w, h) / 10) * 0.6;
  return [left - round, top - round, wide + 2 * round, high + 2 * round];
}

const overlap = ([ax, ay, aw, ah], [bx, by, bw, bh]) => ax < bx + bw && bx < ax + aw && ay < by + bh && by < ay + ah;

// A box's number stands beside it, where no face and no other number is.
export function placeNumbers(boxes, heads, size, { width, height }) {
  const taken = [...heads];
  return boxes.map(([x, y, w, h]) => {
    const [left, right] = [x, x + w].map((v) => clamp(v, 0, width));
    const [top, bottom] = [y, y + h].map((v) => clamp(v, 0, height));
    const outside = [[left, top - size], [right - size, top - size], [left - size, top], [right, top],
      [left - size, bottom - size], [right, bottom - size], [left, bottom], [right - size, bottom]];
    const places = [...outside, [left, bottom - size], [right - size, bottom - size], [left, top], [right - size, top]]
      .filter(([px, py]) => px >= 0 && py >= 0 && px + size <= width && py + size <= height);
    const free = places.find((place) => !taken.some((other) => overlap([...place, size, size], other)));
    const [px, py] = free ?? places[0] ?? [clamp(left, 0, width - size), clamp(bottom - size, 0, height - size)];
    taken.push([px, py, size, size]);
    return [px, py];
  });
}

// The button that removes the picked box: beside its right upper corner, not over the person.
function placeRemove(css) {
  const button = $("remove"), box = state.boxes[state.chosen];
  button.hidden = !box || state.drag !== null;
  if (!box) return;
  const size = 44, gap = 6, [x, y, w, h] = box.map((v) => v * css);
  const width = state.image.width * css, height = state.image.height * css, right = x + w;
  const above = [right - size, y - size - gap], beside = [[right + gap, y], [x - size - gap, y], [right - size, y + h + gap]];
  const places = w > size + 30 ? [above, ...beside] : [...beside, above]; // a narrow box has its number above
  const fits = ([px, py]) => px >= 0 && py >= 0 && px + size <= width && py + size <= height;
  const [px, py] = places.find(fits) ?? [right - size - gap, y + h - size - gap];
  button.style.left = `${clamp(px, 0, width - size)}px`;
  button.style.top = `${clamp(py, 0, height - size)}px`;
  button.ariaLabel = `remove box ${state.chosen + 1}`;
}

function drawPerson(pen, person, index, scale, unit) {
  const points = person.keypoints.map(([x, y, score]) => ({ x: x * scale, y: y * scale, on: score >= lowest() }));
  pen.globalAlpha = state.chosen < 0 || index === state.chosen ? 1 : 0.65;
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
    const pointed = index === current() && k === state.keypoint;
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

// As hrnet_core/skeleton.py knows sides by names: left_eye, EyeRight, l_hip.
const LEFT = /left|(?<![a-z0-9])l(?![a-z0-9])/i;
const RIGHT = /right|(?<![a-z0-9])r(?![a-z0-9])/i;
const SIDES = {
  left: (name) => LEFT.test(name),
  right: (name) => RIGHT.test(name),
  middle: (name) => !LEFT.test(name) && !RIGHT.test(name),
};
const color = (k) => `rgb(${state.model.skeleton.palette[k].join(",")})`;
const firstOf = (side) => state.model.skeleton.keypoints.findIndex(SIDES[side]);
export const dot = (k) => element("span", { className: "dot", style: `background: ${color(k)}` });

export function legend() {
  const sides = Object.keys(SIDES).filter((side) => firstOf(side) >= 0);
  if (sides.length === 1 && sides[0] === "middle") return []; // a hand, a face: no colour has a meaning
  return sides.map((side) => element("span", {}, dot(firstOf(side)), side === "middle" ? side : `the person's ${side}`));
}

function limbColor(a, b) {
  // A limb of one side has its colour; one across the body, or to the head, the middle's.
  const middle = firstOf("middle");
  return color(color(a) === color(b) || middle < 0 ? a : middle);
}
