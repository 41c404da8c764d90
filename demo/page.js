// Runs once for the board of pictures (`element`). Patches are painted here, at once; the server draws at the end of a stroke.
let brush = null;  // while a stroke lasts: whether it hides patches
let stroke = new Map();  // patch -> what it was before the stroke
let last = null;  // where the pointer was
let at = 0;  // the patch where the keys are
let byKeys = false;  // whether they were used last: a new drawing then has the focus that the old one had

const cells = () => element.querySelector(".paint");
const hidden = cell => cell.classList.contains("h");

function patchAt(x, y) {
  const [box, { rows, columns }] = [cells().getBoundingClientRect(), cells().dataset];
  const row = Math.floor((y - box.top) / box.height * rows), column = Math.floor((x - box.left) / box.width * columns);
  return row >= 0 && row < rows && column >= 0 && column < columns ? row * columns + column : -1;
}

function paint(patch) {
  const cell = cells().children[patch];
  if (!cell || hidden(cell) === brush) return;
  if (!stroke.has(patch)) stroke.set(patch, !brush);
  cell.classList.toggle("h", brush);
}

function moveTo(x, y) {  // a fast pointer skips patches: fill in the line
  const from = last || [x, y], steps = Math.ceil(Math.hypot(x - from[0], y - from[1]) / 4) || 1;
  for (let i = 1; i <= steps; i++) paint(patchAt(from[0] + (x - from[0]) * i / steps, from[1] + (y - from[1]) * i / steps));
  last = [x, y];
}

function end() {
  if (brush === null) return;
  brush = null;
  last = null;
  if (!stroke.size) return;
  const mask = [...cells().children].map(cell => hidden(cell) ? "1" : "0").join("");
  if (!mask.includes("0") || !mask.includes("1")) {  // the server says why not
    for (const [patch, was] of stroke) cells().children[patch].classList.toggle("h", was);
  }
  trigger("paint", { mask });
}

function mark() {
  for (const cell of cells().children) cell.toggleAttribute("data-at", cell === cells().children[at]);
}

element.addEventListener("keydown", event => {
  byKeys = cells() === event.target && event.key !== "Tab";
  if (!byKeys) return;
  const [rows, columns] = [Number(cells().dataset.rows), Number(cells().dataset.columns)];
  let [row, column] = [Math.floor(at / columns), at % columns];
  if (event.key === "ArrowUp") row = Math.max(row - 1, 0);
  else if (event.key === "ArrowDown") row = Math.min(row + 1, rows - 1);
  else if (event.key === "ArrowLeft") column = Math.max(column - 1, 0);
  else if (event.key === "ArrowRight") column = Math.min(column + 1, columns - 1);
  else if (event.key === " " || event.key === "Enter") {
    stroke = new Map();
    brush = !hidden(cells().children[at]);
    paint(at);
    end();
  } else return;
  event.preventDefault();
  at = row * columns + column;
  mark();
});
element.addEventListener("focusin", event => { if (cells() === event.target) mark(); });

element.addEventListener("pointerdown", event => {
  byKeys = false;
  if (!cells()?.contains(event.target) || event.button) return;
  event.preventDefault();
  cells().setPointerCapture(event.pointerId);
  const patch = patchAt(event.clientX, event.clientY);
  if (patch < 0) return;
  stroke = new Map();
  brush = !hidden(cells().children[patch]);
  moveTo(event.clientX, event.clientY);
});
element.addEventListener("pointermove", event => { if (brush !== null) moveTo(event.clientX, event.clientY); });
element.addEventListener("pointerup", end);
element.addEventListener("pointercancel", end);
element.addEventListener("dragstart", event => event.preventDefault());
const status = document.createElement("div");  // for screen readers, who are told of changes of what was there before
status.className = "status";
status.role = "status";
element.after(status);

watch("value", () => {  // an answer that comes during a stroke does not undo it
  if (brush !== null) for (const patch of stroke.keys()) cells().children[patch]?.classList.toggle("h", brush);
  if (at >= cells().children.length) at = 0;  // of another model
  if (byKeys) {
    cells().focus({ preventScroll: true });
    mark();
  }
  status.textContent = element.querySelector("#loss").innerText;
});
