// The timeline of one question: every strategy on one clock, a lane per sequence, a bar per step; and its replay.

const LANE = 15, GAP = 3;

function timeline(place, answers, zoom) {
  const longest = Math.max(0.001, ...answers.map((answer) => answer.seconds));
  const visible = Math.max(240, place.clientWidth - 2);
  const width = Math.round(visible * zoom), left = 2;
  const x = linear(0, longest, left, width - 64);
  const marks = ticks(0, longest, width / 90);
  const axis = canvas(width, 22, "Seconds", svg("g", { class: "axis" },
    marks.map((value) => svg("text", { x: x(value), y: 14, "text-anchor": value ? "middle" : "start" }, `${short(value)} s`))));
  const lanes = [];
  const rows = answers.map((answer) => {
    const strategy = data.strategies[answer.strategy], steps = stepsOf(answer);
    const sequences = [...new Set(steps.map((step) => step.sequence))], texts = written(answer, steps);
    const lane = (sequence) => GAP + sequences.indexOf(sequence) * (LANE + GAP);
    const height = Math.max(1, sequences.length) * (LANE + GAP) + GAP;
    const bars = steps.map((step) => {
      const y = lane(step.sequence);
      const from = x(step.start), wide = Math.max(0.8, x(step.end) - from - 0.6);
      const label = step.committed && wide > measure(String(step.committed), 10) + 3
        ? svg("text", { x: from + wide / 2, y: y + 11.5, "text-anchor": "middle", class: `count d${depth(step.committed)}` }, String(step.committed)) : null;
      return svg("g", { "data-tip": describe(step, texts.get(step.index)), "data-link": `${answer.strategy}-${step.index}` },
        svg("rect", { x: from, y, width: wide, height: LANE, rx: Math.min(2, wide / 3), class: `step s${strategy.index} ${step.prefill ? "prefill" : `d${depth(step.committed)}`}` }), label);
    });
    if (!steps.length && !answer.error) // a backend that reports no steps still took its time
      bars.push(svg("rect", { x: x(0), y: GAP, width: Math.max(1, x(answer.seconds) - x(0)), height: LANE, rx: 2, class: `step s${strategy.index} d1` }));
    const parts = new Map(answer.parts.flatMap((part) => part.sequences.map((sequence) => [sequence, part.label])));
    const what = answer.error ? `failed: ${answer.error}` :
      seconds(answer.seconds) + (steps.length ? `, ${plural(new Set(steps.map((step) => step.step)).size, "step")}, ${plural(sequences.length, "sequence")}` : ", steps not recorded") +
      (parts.size ? ` (${[...new Set(parts.values())].join(", ")})` : "");
    const names = sequences.filter((sequence) => parts.has(sequence)).map((sequence) => {
      let from = x(Math.max(...steps.filter((step) => step.sequence === sequence).map((step) => step.end))) + 5;
      const name = parts.get(sequence), close = x(answer.seconds) + 5;
      if (from + measure(name) > close - 8) from = close + (lane(sequence) === GAP ? measure(seconds(answer.seconds)) + 8 : 0); // past the line of the end
      return svg("text", { x: from, y: lane(sequence) + 11.5, class: "faint" }, fit(name, width - from));
    });
    for (const sequence of sequences) lanes.push(laneNumbers(strategy, parts.get(sequence), steps.filter((step) => step.sequence === sequence)));
    return html("div", { class: "lanes" },
      html("p", { class: "lane-name" }, html("i", { class: `swatch s${strategy.index}`, "aria-hidden": "true" }), html("b", {}, breakable(strategy.name)), html("span", {}, what)),
      canvas(width, height, `${strategy.name}: ${what}`,
        marks.map((value) => svg("line", { x1: x(value), x2: x(value), y1: 0, y2: height, class: "grid" })),
        bars, names,
        svg("line", { x1: x(answer.seconds), x2: x(answer.seconds), y1: 0, y2: height, class: `end s${strategy.index}` }),
        svg("text", { x: x(answer.seconds) + 5, y: GAP + 11.5, class: "value" }, seconds(answer.seconds)),
        svg("line", { x1: 0, x2: 0, y1: 0, y2: height, class: "cursor", visibility: "hidden" })));
  });
  place.replaceChildren(html("div", { class: "sheet" }, axis, ...rows));
  numbers("timeline", ["strategy", "sequence", "from", "to", "steps", "prompt tokens read", "found in the cache", "tokens gained", "guesses", "confirmed"], lanes);
  return { longest, x };
}

/** The arrow keys go from bar to bar; what a pointer would read beside it is said below. */
function walk(place, said) {
  place.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key], bars = [...place.querySelectorAll("[data-link]")];
    if (!by || !bars.length) return;
    event.preventDefault();
    const at = bars.findIndex((bar) => bar.classList.contains("linked"));
    const bar = bars[Math.min(bars.length - 1, Math.max(0, at < 0 ? 0 : at + by))];
    light(bar.dataset.link);
    bar.scrollIntoView({ block: "nearest", inline: "nearest" });
    said.textContent = `${data.strategies[Number(bar.dataset.link.split("-")[0])].name}, ${bar.dataset.tip}`;
  });
}

/** A lane in figures, for the table below the timeline. */
function laneNumbers(strategy, part, steps) {
  const sum = (value) => String(steps.reduce((total, step) => total + value(step), 0));
  return [strategy.name, part || "answer", seconds(steps[0].start), seconds(steps[steps.length - 1].end), String(steps.length),
    sum((step) => (step.prefill ? step.tokens : 0)), sum((step) => step.reused), sum((step) => step.committed), sum((step) => step.drafted), sum((step) => step.accepted)];
}

/** The clock over timeline and answers: at time t, only what had been written by t is visible. */
function player(controls) {
  let view = null, playing = false, began = 0, offset = 0;
  const button = controls.play, range = controls.clock;
  const show = (time) => {
    if (!view) return;
    const done = time >= view.longest;
    controls.now.textContent = done ? `${seconds(view.longest)}` : `${time.toFixed(2)} s`;
    range.setAttribute("aria-valuetext", controls.now.textContent);
    for (const line of document.querySelectorAll("#timeline .cursor")) {
      line.setAttribute("x1", view.x(time)); line.setAttribute("x2", view.x(time));
      line.setAttribute("visibility", done ? "hidden" : "visible");
    }
    for (const node of view.timed) node.span.classList.toggle("future", !done && node.end > time);
    for (const node of view.clocks) node.span.textContent = node.text(Math.min(time, node.end), done);
  };
  const tick = (now) => {
    if (!playing) return;
    const time = offset + (now - began) / 1000;
    range.value = String(Math.round((1000 * time) / view.longest));
    show(Math.min(time, view.longest));
    if (time >= view.longest) stop(); else requestAnimationFrame(tick);
  };
  const stop = () => { playing = false; button.textContent = "Replay"; };
  const start = () => {
    if (!view) return;
    const at = (Number(range.value) / 1000) * view.longest;
    offset = at >= view.longest * 0.999 ? 0 : at;
    playing = true; button.textContent = "Pause"; began = performance.now();
    requestAnimationFrame(tick);
  };
  button.addEventListener("click", () => (playing ? stop() : start()));
  range.addEventListener("input", () => { stop(); show((Number(range.value) / 1000) * view.longest); });
  return {
    /** A new question, or the same drawn anew: {longest, x, timed, clocks}. */
    load(next, keep) {
      view = next;
      if (!keep) { stop(); range.value = "1000"; }
      show((Number(range.value) / 1000) * view.longest);
    },
  };
}
