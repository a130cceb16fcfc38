// Drawing: elements, scales, axes, the tooltip. Figures are redrawn when their width changes; colors are CSS
// variables, so the theme changes without redrawing.

const SVG = "http://www.w3.org/2000/svg";

/** A DOM or SVG element with attributes and children; `on` holds event listeners. */
function make(namespace, name, attributes, children) {
  const node = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
const svg = (name, attributes, ...children) => make(SVG, name, attributes, children);
const html = (name, attributes, ...children) => make(null, name, attributes, children);

/** A strategy's text form with places where a line may end. */
const breakable = (name) => html("span", { class: "breakable" }, name.split(/(?<=[(,=])/).flatMap((piece, i) => (i ? [html("wbr"), piece] : [piece])));

const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.01 ? 1 : 0)} %`;
function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 0.1 ? `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}
function interval(estimate) {
  if (!estimate) return "–";
  const [middle, low, high] = estimate;
  return low === null ? `${fixed(middle)}×` : `${fixed(middle)}× [${fixed(low)}, ${fixed(high)}]`;
}

/** Map [from, to] to [left, right]. */
function linear(from, to, left, right) {
  const scale = (value) => left + ((value - from) / (to - from || 1)) * (right - left);
  scale.domain = [from, to];
  scale.range = [left, right];
  return scale;
}
function logarithmic(from, to, left, right) {
  const inner = linear(Math.log(from), Math.log(to), left, right);
  const scale = (value) => inner(Math.log(value));
  scale.domain = [from, to];
  scale.range = [left, right];
  return scale;
}

/** About `count` round numbers within [from, to]. */
function ticks(from, to, count) {
  const rough = (to - from || 1) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(from / unit - 1e-9); i * unit <= to + 1e-9 * unit; i++) found.push(+(i * unit).toPrecision(12));
  return found;
}
/** Round ratios within [from, to], coarser if more than `most` would fit. */
function ratioTicks(from, to, most) {
  for (const marks of [[1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8], [1, 1.5, 2, 3, 4, 6, 8], [1, 2, 4], [1]]) {
    const all = new Set();
    for (const mark of marks) for (const scale of [1, 10]) all.add(mark * scale).add(1 / (mark * scale));
    const inside = [...all].filter((value) => value >= from * 0.999 && value <= to * 1.001).sort((a, b) => a - b);
    if (inside.length <= most) return inside;
  }
  return [1];
}
/** Round numbers within [from, to] on a logarithmic axis, at most `most`. */
function powerTicks(from, to, most) {
  for (const marks of [[1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 6, 8], [1, 2, 4, 6], [1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(from)); power <= Math.log10(to); power++)
      for (const mark of marks) found.push(+(mark * 10 ** power).toPrecision(6));
    const inside = found.filter((value) => value >= from && value <= to);
    if (inside.length <= most) return inside;
  }
  return [];
}
const short = (value) => String(+value.toPrecision(value < 1 ? 2 : 3));

/** Axis along the bottom with grid lines up to `top`. */
function axisBelow(scale, marks, y, top, label, format = short) {
  const [left, right] = scale.range;
  return svg("g", { class: "axis" },
    marks.map((value) => svg("line", { x1: scale(value), x2: scale(value), y1: top, y2: y, class: "grid" })),
    marks.map((value) => svg("text", { x: scale(value), y: y + 16, "text-anchor": "middle" }, format(value))),
    label ? svg("text", { x: (left + right) / 2, y: y + 34, "text-anchor": "middle", class: "label" }, label) : null);
}
/** Axis along the left with grid lines over to `right`; its label stands above it. */
function axisLeft(scale, marks, x, right, label, format = short) {
  return svg("g", { class: "axis" },
    marks.map((value) => svg("line", { x1: x, x2: right, y1: scale(value), y2: scale(value), class: "grid" })),
    marks.map((value) => svg("text", { x: x - 7, y: scale(value) + 4, "text-anchor": "end" }, format(value))),
    label ? svg("text", { x: 0, y: 11, class: "label" }, label) : null);
}

/** A strategy's mark: shape and color both tell it apart. */
function mark(x, y, index, size, extra) {
  const class_ = `mark s${index} ${(extra && extra.class) || ""}`;
  const attributes = { ...extra, class: class_ };
  const shape = index % 4;
  if (shape === 0) return svg("circle", { cx: x, cy: y, r: size, ...attributes });
  const paths = [
    null,
    `M${x - size * 0.9},${y - size * 0.9}h${size * 1.8}v${size * 1.8}h${-size * 1.8}z`,
    `M${x},${y - size * 1.25}L${x + size * 1.25},${y}L${x},${y + size * 1.25}L${x - size * 1.25},${y}z`,
    `M${x},${y - size * 1.15}L${x + size * 1.15},${y + size * 0.85}H${x - size * 1.15}z`,
  ];
  return svg("path", { d: paths[shape], ...attributes });
}

/** What stands for each strategy; `shapes` where the figure marks them by shape as well as color. */
function legend(rows, shapes, ...others) {
  return html("p", { class: "key" }, rows.map((row) => html("span", {},
    shapes ? svg("svg", { width: 16, height: 12, "aria-hidden": "true" }, mark(6, 6, row.index, 4.5)) : html("i", { class: `swatch s${row.index}` }),
    breakable(row.name))), others.map((text) => html("span", {}, text)));
}

/** Width of a text in the figures' type, in pixels. */
const measure = (() => {
  let context = null;
  return (text, size = 12) => {
    context = context || document.createElement("canvas").getContext("2d");
    context.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
    return context.measureText(text).width;
  };
})();
/** `text`, cut with an ellipsis to fit into `width` pixels. */
function fit(text, width, size = 12) {
  if (measure(text, size) <= width) return text;
  let length = text.length;
  while (length > 1 && measure(text.slice(0, length) + "…", size) > width) length--;
  return text.slice(0, length) + "…";
}

/** The frame of a figure: labelled for screen readers, which find the numbers in the table below. */
function canvas(width, height, description, ...children) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description }, ...children);
}

/** Light up what belongs together: the bar of a step and the words that it wrote. */
function light(name) {
  for (const node of document.querySelectorAll(".linked")) node.classList.remove("linked");
  if (name) for (const node of document.querySelectorAll(`[data-link="${name}"]`)) node.classList.add("linked");
}

/** Show `text` beside whatever carries `data-tip`, for pointers and for the keyboard's focus alike. */
function tooltips() {
  const tip = document.getElementById("tip");
  let linked = null;
  const show = (event) => {
    const target = event.target.closest && event.target.closest("[data-tip]");
    if (!target) { tip.hidden = true; return; }
    tip.textContent = target.getAttribute("data-tip");
    tip.hidden = false;
    const box = target.getBoundingClientRect();
    const x = event.clientX || box.left + box.width / 2;
    const y = event.clientY || box.top;
    const left = Math.min(Math.max(6, x + 12), innerWidth - tip.offsetWidth - 6);
    const above = y - tip.offsetHeight - 12;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 6 ? y + 16 : above}px`;
  };
  const link = (event) => {
    const target = event.target.closest && event.target.closest("[data-link]");
    const name = target && target.getAttribute("data-link");
    if (name === linked) return;
    light(name);
    linked = name;
  };
  document.addEventListener("pointermove", show, { passive: true });
  document.addEventListener("pointermove", link, { passive: true });
  document.addEventListener("focusin", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
}

/** A table of numbers: what a figure shows, for reading and for copying. */
function numbers(id, head, rows) {
  const place = document.querySelector(`[data-numbers="${id}"]`);
  if (!place) return;
  place.replaceChildren(html("table", {},
    html("thead", {}, html("tr", {}, head.map((title) => html("th", { scope: "col" }, title)))),
    html("tbody", {}, rows.map(([first, ...cells]) =>
      html("tr", {}, html("th", { scope: "row" }, first), cells.map((cell) => html("td", {}, cell)))))));
}
