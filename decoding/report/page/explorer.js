// Choosing a question and reading its answers side by side, colored by the steps that wrote them.

const byId = (id) => document.getElementById(id);

function explorer(state) {
  const controls = { play: byId("play"), clock: byId("clock"), now: byId("now") };
  const replay = player(controls);
  const parsed = new Map();
  let shown = { place: 0, repeat: 0 };

  const questionAt = (place) => {
    if (!parsed.has(place)) parsed.set(place, JSON.parse(byId(`q${place}`).textContent));
    return parsed.get(place);
  };

  const options = data.questions.map((question, place) => ({
    place, category: question.category, text: `${question.id} · ${question.title}`, words: `${question.id} ${question.category} ${question.title}`.toLowerCase(),
  }));
  const fill = (wanted) => {
    const groups = new Map();
    for (const option of options) if (wanted.every((word) => option.words.includes(word))) {
      if (!groups.has(option.category)) groups.set(option.category, []);
      groups.get(option.category).push(option);
    }
    byId("question").replaceChildren(...[...groups].map(([name, members]) => html("optgroup", { label: name },
      members.map((option) => html("option", { value: option.place, selected: option.place === shown.place ? "" : null }, option.text)))));
    if (!groups.size) byId("question").replaceChildren(html("option", { disabled: "" }, "no question matches"));
    return groups.size ? [...groups.values()].flat().map((option) => option.place) : [];
  };

  /** Everybody who guessed in the answers to this question; colors follow this order. */
  const guessers = () => [...new Set(questionAt(shown.place).answers.flatMap((answer) =>
    answer.steps.sources ? answer.steps.sources.flatMap((names) => names.split(" ")) : answer.steps.drafters))].filter(Boolean);

  /** Paint the groups of tokens; returns the spans with the time at which they were written. */
  const body = (answer, strategy, steps, longest, paint) => {
    const timed = [], drafters = guessers();
    if (paint === "plain") return { nodes: [html("p", { class: "text" }, answer.text)], timed };
    let count = 0;
    const color = (step, turn, part, guesser) => ({
      together: () => `s${strategy.index} d${depth(step.committed)}`,
      step: () => `s${strategy.index} d${turn % 2 ? 4 : 1}`,
      origin: () => (guesser ? `s${strategy.index} d4` : ""),
      part: () => (part < 0 ? "" : `g${part % 6}`),
      drafter: () => (guesser ? `g${Math.max(0, drafters.indexOf(guesser)) % 6}` : "g-none"),
      time: () => `t${Math.min(9, Math.floor((10 * step.end) / longest))}`,
    })[paint]();
    const nodes = blocksOf(answer, steps).map((block, part) => {
      const runs = block.groups.flatMap(({ step, pieces }, turn) =>
        (step && (paint === "origin" || paint === "drafter") ? byOrigin(step, pieces) : [{ guesser: "", pieces }]).map((run) => ({ step, turn, ...run })));
      const spans = runs.map(({ step, turn, guesser, pieces }) => {
        const from = count;
        count += pieces.length;
        const class_ = step ? `piece ${color(step, turn, block.label ? part : -1, guesser)}`.trim() : "piece";
        // Leading space stays outside the color, where it would stand out at the end of a line.
        const space = pieces.length ? pieces[0].match(/^\s*/)[0] : "";
        const shown = pieces.map((piece, i) => (i ? piece : piece.slice(space.length)));
        const at = answer.differs === null || answer.parts.length ? -1 : answer.differs - from;
        const text = at < 0 || at >= pieces.length ? [shown.join("")] : [
          shown.slice(0, at).join(""),
          html("mark", { "data-tip": `first token that differs from plain decoding (${answer.differs})` }, shown[at]),
          shown.slice(at + 1).join("")];
        const span = html("span", { class: class_, "data-tip": step ? describe(step) : null, "data-link": step ? `${answer.strategy}-${step.index}` : null }, text);
        if (step) timed.push({ span, end: step.end });
        return [space, span];
      });
      return html("div", { class: "block" }, block.label ? html("span", { class: "part-label" }, block.label) : null, html("p", { class: "text" }, spans));
    });
    return { nodes, timed };
  };

  const facts = (answer) => {
    const found = [`${answer.tokens} tokens`];
    if (answer.forwards) found.push(`${answer.forwards} forwards`, `${fixed(answer.perForward)} per forward`);
    for (const [name, score] of Object.entries(answer.quality)) found.push(`${name} ${fixed(score)}`);
    if (answer.finish !== "eos") found.push(`ended by ${answer.finish}`);
    return found.join(" · ");
  };
  const sameness = (answer, strategy) => {
    if (!answer.compared || answer.error) return null;
    if (answer.differs === null) return html("span", { class: "same" }, "same as plain");
    if (answer.parts.length) return null; // assembled from several sequences, it has no common order to differ in
    return html("span", { class: strategy.lossless ? "differs bad" : "differs" }, `differs from token ${answer.differs}`);
  };

  const key = (paint) => {
    const entries = {
      together: [1, 2, 3, 4, 5, 6].map((d) => html("span", {}, html("i", { class: `swatch ink d${d}` }), d === 6 ? "6 or more" : String(d))),
      time: [html("span", {}, "start"), html("span", { class: "ramp" }, Array.from({ length: 10 }, (_, t) => html("i", { class: `t${t}` }))), html("span", {}, "end of the slowest")],
      step: [html("span", {}, "light and dark in turn, a change for every step")],
      origin: [html("span", {}, html("i", { class: "swatch ink d4" }), "confirmed guess"), html("span", {}, html("i", { class: "swatch g-none" }), "the model's own token")],
      part: questionAt(shown.place).answers.some((answer) => answer.parts.length) ? [html("span", {}, "a color for the outline and one for every point")] : [html("span", {}, "no answer has parts")],
      drafter: [html("span", {}, html("i", { class: "swatch g-none" }), "the model itself"), ...guessers().map((name, i) => html("span", {}, html("i", { class: `swatch g${i % 6}` }), name))],
      plain: [],
    };
    byId("key").replaceChildren(...entries[paint]);
  };

  const draw = (keep) => {
    const question = questionAt(shown.place), paint = byId("paint").value;
    const repeats = [...new Set(question.answers.map((answer) => answer.repeat))];
    if (!repeats.includes(shown.repeat)) shown.repeat = repeats[0];
    byId("repeat-label").hidden = repeats.length < 2;
    byId("repeat").replaceChildren(...repeats.map((repeat) => html("option", { value: repeat, selected: repeat === shown.repeat ? "" : null }, String(repeat + 1))));
    const answers = question.answers.filter((answer) => answer.repeat === shown.repeat && !state.hidden.has(answer.strategy));
    byId("asked").textContent = question.question;
    const zoom = 12 ** (Number(byId("zoom").value) / 100);
    const { longest, x } = timeline(byId("timeline"), answers, zoom);
    const timed = [], clocks = [];
    byId("explorer").replaceChildren(...answers.map((answer) => {
      const strategy = data.strategies[answer.strategy], painted = body(answer, strategy, stepsOf(answer), longest, paint);
      timed.push(...painted.timed);
      const clock = html("span", { class: "clock-face" }, seconds(answer.seconds));
      clocks.push({ span: clock, end: answer.seconds, text: (time, done) => (done ? seconds(answer.seconds) : `${time.toFixed(2)} s`) });
      return html("article", { class: `answer s${strategy.index}` },
        html("header", {}, html("h4", {}, html("i", { class: `swatch s${strategy.index}`, "aria-hidden": "true" }), breakable(strategy.name)), clock),
        html("p", { class: "facts" }, html("span", {}, facts(answer)), sameness(answer, strategy)),
        answer.error ? html("p", { class: "error-text" }, answer.error) : null,
        painted.nodes);
    }));
    key(paint);
    replay.load({ longest, x, timed, clocks }, keep);
  };

  const open = (place) => {
    shown = { ...shown, place };
    byId("step").textContent = "";
    byId("question").value = String(place);
    draw(false);
  };
  let found = fill([]);
  const move = (by) => {
    if (!found.length) return;
    const at = found.indexOf(shown.place);
    open(found[(Math.max(0, at) + by + found.length) % found.length]);
  };
  walk(byId("timeline"), byId("step"));
  byId("question").addEventListener("change", (event) => open(Number(event.target.value)));
  byId("find").addEventListener("input", (event) => {
    found = fill(event.target.value.toLowerCase().split(/\s+/).filter(Boolean));
    if (found.length && !found.includes(shown.place)) open(found[0]);
  });
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  byId("repeat").addEventListener("change", (event) => { shown.repeat = Number(event.target.value); draw(false); });
  byId("paint").addEventListener("change", () => draw(true));
  byId("zoom").addEventListener("input", () => draw(true));
  return { open: (place) => { byId("find").value = ""; found = fill([]); open(place); }, draw };
}
