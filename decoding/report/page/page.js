// The page around the figures: theme, sorting, the filter of strategies, redrawing.

const state = { hidden: new Set() };

function theme() {
  const root = document.documentElement;
  const remembered = (() => { try { return localStorage.getItem("theme"); } catch { return null; } })();
  if (remembered) root.dataset.theme = remembered;
  byId("theme").addEventListener("click", () => {
    const dark = (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* a page opened from a file may have no storage */ }
  });
}

function sorting(table) {
  const body = table.tBodies[0], initial = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const next = { none: "descending", descending: "ascending", ascending: "none" }[head.getAttribute("aria-sort")];
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", next);
      const value = (row) => { const n = Number(row.cells[column].dataset.value); return Number.isNaN(n) ? -Infinity : n; };
      const rows = [...initial];
      if (next !== "none") rows.sort((a, b) => (next === "descending" ? value(b) - value(a) : value(a) - value(b)));
      body.replaceChildren(...rows);
    });
  });
}

function drawFigures() {
  const strategies = data.strategies.filter((strategy) => !state.hidden.has(strategy.index));
  for (const place of document.querySelectorAll("[data-figure]")) {
    const width = Math.floor(place.clientWidth);
    if (width > 0) FIGURES[place.dataset.figure](place, width, strategies);
  }
}

function filter(redraw) {
  byId("filter").append(...data.strategies.map((strategy) => html("button", {
    type: "button", "aria-pressed": "true", on: { click: (event) => {
      if (state.hidden.has(strategy.index)) state.hidden.delete(strategy.index);
      else if (state.hidden.size < data.strategies.length - 1) state.hidden.add(strategy.index);
      event.currentTarget.setAttribute("aria-pressed", String(!state.hidden.has(strategy.index)));
      redraw();
    } },
  }, html("i", { class: `swatch s${strategy.index}`, "aria-hidden": "true" }), breakable(strategy.name))));
}

theme();
tooltips();
sorting(byId("headline"));
const answers = data.questions.length ? explorer(state) : null;
filter(() => { drawFigures(); if (answers) answers.draw(true); });
drawFigures();
if (answers) answers.open(0);
document.addEventListener("click", (event) => {
  const dot = event.target.closest("[data-question]");
  if (!dot || !answers) return;
  answers.open(Number(dot.dataset.question));
  byId("answers").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
});
let width = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(() => { drawFigures(); if (answers) answers.draw(true); }, 120);
});
document.documentElement.dataset.ready = "true";
