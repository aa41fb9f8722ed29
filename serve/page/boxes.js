// Boxes: drawn, picked, moved, sized and removed on the picture, by keys, or by their number fields.

import { $, canvas, clamp, draw, element, shownScale, state } from "./picture.js";

let changed; // the boxes are other ones
let picked;  // another box is picked, or none

export function editBoxes(onChange, onPick) {
  [changed, picked] = [onChange, onPick];
  canvas.addEventListener("pointerdown", press);
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", giveUp);
  canvas.addEventListener("keydown", key);
  $("remove").addEventListener("click", () => removeBox(state.chosen));
  $("add").addEventListener("click", newBox);
}

export function pick(index) {
  state.chosen = index;
  state.keypoint = -1;
  picked();
}

function setBox(index, box) {
  const { width, height } = state.image;
  const [w, h] = [Math.max(1, Math.round(box[2])), Math.max(1, Math.round(box[3]))];
  const x = clamp(Math.round(box[0]), Math.min(0, width - w), Math.max(0, width - w));
  const y = clamp(Math.round(box[1]), Math.min(0, height - h), Math.max(0, height - h));
  state.boxes[index] = [x, y, w, h];
  state.chosen = index;
  changed();
}

function newBox() {
  const { width, height } = state.image;
  setBox(state.boxes.length, [width * 0.25, height * 0.1, width * 0.5, height * 0.8]);
  canvas.focus();
}

function removeBox(index) {
  if (!state.boxes[index]) return;
  state.boxes.splice(index, 1);
  state.chosen = Math.min(index, state.boxes.length - 1);
  changed();
  canvas.focus({ preventScroll: true });
}

// --- the pointer -------------------------------------------------------------------------------

function at(event) {
  const frame = canvas.getBoundingClientRect(), { width, height } = state.image;
  return {
    x: clamp(((event.clientX - frame.left) / frame.width) * width, 0, width),
    y: clamp(((event.clientY - frame.top) / frame.height) * height, 0, height),
  };
}

const holds = ([x, y, w, h], point) => point.x >= x && point.x <= x + w && point.y >= y && point.y <= y + h;

// Which edges of a box are at a point: x and y are -1 (left, top), 0 or 1; null for none. A finger is 44 px wide; of a
// small box a third of each side at most, so that it can still be moved.
function edgesAt([x, y, w, h], point, finger) {
  const reach = (finger ? 22 : 8) / shownScale();
  if (!holds([x - reach, y - reach, w + 2 * reach, h + 2 * reach], point)) return null;
  const side = (v, low, size) => {
    const inner = Math.min(reach, size / 3);
    return v < low + inner ? -1 : v > low + size - inner ? 1 : 0;
  };
  const edges = { x: side(point.x, x, w), y: side(point.y, y, h) };
  return edges.x || edges.y ? edges : null;
}

// What a drag from here would do: size or move the picked box, move one that is held by its edge, draw a new one.
function grip(point, finger, fresh) {
  const chosen = state.boxes[state.chosen];
  if (fresh) return { kind: "new" };
  const edges = chosen && edgesAt(chosen, point, finger);
  if (edges) return { kind: "size", index: state.chosen, edges };
  if (chosen && holds(chosen, point)) return { kind: "move", index: state.chosen };
  const index = state.boxes.findIndex((box) => edgesAt(box, point, false));
  return index >= 0 ? { kind: "move", index } : { kind: "new" };
}

const CURSORS = { "-1,-1": "nwse", "1,1": "nwse", "-1,1": "nesw", "1,-1": "nesw", "-1,0": "ew", "1,0": "ew", "0,-1": "ns", "0,1": "ns" };

function press(event) {
  if (event.button !== 0 || !state.image || state.drag) return;
  canvas.setPointerCapture(event.pointerId);
  const from = at(event), held = grip(from, event.pointerType !== "mouse", event.shiftKey);
  state.drag = { ...held, from, id: event.pointerId, start: state.boxes[held.index], box: null };
}

function move(event) {
  if (!state.image) return;
  const { drag } = state, to = at(event);
  if (!drag) {
    const { kind, edges } = grip(to, false, event.shiftKey);
    canvas.style.cursor = kind === "size" ? `${CURSORS[`${edges.x},${edges.y}`]}-resize` : kind === "move" ? "move" : "crosshair";
    return;
  }
  if (event.pointerId !== drag.id) return;
  const far = Math.hypot(to.x - drag.from.x, to.y - drag.from.y) * shownScale();
  if (!drag.box && far < 4) return; // a click, so far
  if (drag.index >= 0) state.chosen = drag.index;
  drag.box = dragged(drag, to);
  draw();
}

function dragged({ kind, edges, start, from }, to) {
  const dx = to.x - from.x, dy = to.y - from.y;
  if (kind === "new") return between(from.x, from.y, to.x, to.y);
  const [x, y, w, h] = start;
  if (kind === "move") return [x + dx, y + dy, w, h];
  const moved = (edge, of, by) => (edge === of ? by : 0);
  return between(x + moved(edges.x, -1, dx), y + moved(edges.y, -1, dy), x + w + moved(edges.x, 1, dx), y + h + moved(edges.y, 1, dy));
}

const between = (ax, ay, bx, by) => [Math.min(ax, bx), Math.min(ay, by), Math.abs(bx - ax), Math.abs(by - ay)];

function release(event) {
  const { drag } = state;
  if (!drag || event.pointerId !== drag.id) return;
  move(event);
  state.drag = null;
  const smallest = 6 / shownScale();
  if (!drag.box) pickAt(drag.from);
  else if (drag.kind === "new" && Math.min(drag.box[2], drag.box[3]) < smallest) draw(); // a slip
  else setBox(drag.kind === "new" ? state.boxes.length : drag.index, drag.box);
}

function giveUp() {
  state.drag = null;
  draw();
}

// The smallest box there; clicked again, the next larger one; beside all boxes none is picked.
function pickAt(point) {
  const there = state.boxes.map((box, i) => [box[2] * box[3], i]).filter(([, i]) => holds(state.boxes[i], point));
  const order = there.sort(([a], [b]) => a - b).map(([, i]) => i);
  pick(order.length ? order[(order.indexOf(state.chosen) + 1) % order.length] : -1);
}

// --- keys, while the picture has the focus -----------------------------------------------------

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function key(event) {
  const box = state.boxes[state.chosen], arrow = ARROWS[event.key];
  if (event.ctrlKey || event.metaKey) return;
  if (event.key === "Escape" && state.drag) giveUp();
  else if (event.key === "Escape") pick(-1);
  else if (event.key === "n") newBox();
  else if (/^[1-9]$/.test(event.key) && state.boxes[event.key - 1]) pick(event.key - 1);
  else if (event.key === "Delete" || event.key === "Backspace") removeBox(state.chosen);
  else if (event.key === "Enter") $("find").click();
  else if (arrow && box) {
    const step = event.altKey ? 1 : Math.max(1, Math.round(8 / shownScale())), [dx, dy] = arrow.map((v) => v * step);
    const [x, y, w, h] = box;
    setBox(state.chosen, event.shiftKey ? [x, y, w + dx, h + dy] : [x + dx, y + dy, w, h]);
  } else return;
  event.preventDefault();
}

// --- number fields -----------------------------------------------------------------------------

const LABELS = ["x", "y", "width", "height"];

export function listBoxes() {
  const list = $("boxlist");
  while (list.children.length > state.boxes.length) list.lastChild.remove();
  while (list.children.length < state.boxes.length) list.append(row(list.children.length));
  state.boxes.forEach((box, i) => {
    const [number, ...fields] = list.children[i].children;
    number.ariaPressed = String(i === state.chosen);
    fields.slice(0, 4).forEach((field, part) => { // not under the fingers of who types
      if (field !== document.activeElement) field.value = Math.round(box[part]);
    });
  });
}

function row(i) {
  const fields = LABELS.map((label, part) => element("input", {
    type: "number", step: "any", ariaLabel: `box ${i + 1} ${label}`,
    oninput({ target }) {
      if (!Number.isFinite(target.valueAsNumber)) return;
      state.boxes[i][part] = target.valueAsNumber;
      state.chosen = i;
      changed();
    },
    onblur: listBoxes,
    onkeydown: ({ key: pressed }) => pressed === "Enter" && $("find").click(),
  }));
  const number = element("button", { type: "button", ariaLabel: `pick box ${i + 1}`, onclick: () => pick(i) }, `${i + 1}`);
  const remove = element("button", { type: "button", ariaLabel: `remove box ${i + 1}`, onclick: () => removeBox(i) }, "×");
  return element("li", {}, number, ...fields, remove);
}
