// The figures of the whole run. Each is a function (place, width, strategies shown) that fills its place and the
// table of numbers below it.

const data = JSON.parse(document.getElementById("data").textContent);
data.strategies.forEach((strategy, index) => { strategy.index = index; });
const LINE = 12; // text size of figures, pixels

const extent = (values) => [Math.min(...values), Math.max(...values)];
const rivals = (strategies) => strategies.filter((strategy) => strategy.speedup);
/** A range of ratios that holds all `values` and 1, with a little room. */
function ratioRange(values) {
  const [low, high] = extent([1, ...values.filter((value) => value > 0)]);
  const room = Math.max((high / low) ** 0.06, 1.04);
  return [low / room, high * room];
}

function empty(place, text) {
  place.replaceChildren(html("p", { class: "nothing" }, text));
}

function forest(place, width, strategies) {
  const rows = rivals(strategies);
  if (!rows.length) return empty(place, "There is no plain decoding to compare with, or nothing to compare.");
  const height = 76, left = 8, right = width - 8, bottom = rows.length * height + 6;
  const ends = rows.flatMap((row) => [...row.speedup, ...row.geometric || [], ...row.ratios.map(([, ratio]) => ratio)]);
  const x = logarithmic(...ratioRange(ends.filter((value) => value !== null)), left, right);
  const whisker = (estimate, y, class_) => estimate[1] === null ? null :
    svg("line", { x1: x(estimate[1]), x2: x(estimate[2]), y1: y, y2: y, class: class_ });
  const unseen = (row, y) => { // differences that a run of this size would often miss
    if (row.detectable === null) return null;
    const from = Math.max(left, x(1 / row.detectable)), to = Math.min(right, x(row.detectable));
    return svg("rect", { x: from, y: y + 24, width: to - from, height: 46, class: "unseen", "data-tip": `detectable: ${fixed(row.detectable)}× or ${fixed(1 / row.detectable)}×` });
  };
  place.replaceChildren(canvas(width, bottom + 42, "Speed-up of each strategy with its 95 percent interval",
    axisBelow(x, ratioTicks(...x.domain, width / 52), bottom, 0, "times as fast as plain decoding", (value) => `${short(value)}×`),
    svg("line", { x1: x(1), x2: x(1), y1: 0, y2: bottom, class: "one" }),
    rows.map((row, i) => {
      const y = i * height, s = `s${row.index}`;
      const figure = interval(row.speedup), room = right - left - measure(figure) - 16;
      return svg("g", {},
        unseen(row, y),
        svg("text", { x: left, y: y + 16, class: "name" }, fit(row.name, room)),
        svg("text", { x: right, y: y + 16, "text-anchor": "end", class: "strong" }, figure),
        row.ratios.map(([question, ratio]) => svg("circle", {
          cx: x(ratio), cy: y + 50 + (((question * 7919) % 13) - 6) * 1.25, r: 2.6, class: `dot ${s}`,
          "data-question": question, "data-tip": `${fixed(ratio)}× on question ${data.questions[question].id} (${data.questions[question].category})`,
        })),
        whisker(row.speedup, y + 34, `whisker ${s}`), mark(x(row.speedup[0]), y + 34, row.index, 5.5, { "data-tip": `Σ ratio ${figure}` }),
        row.geometric ? whisker(row.geometric, y + 62, `whisker thin ${s}`) : null,
        row.geometric ? mark(x(row.geometric[0]), y + 62, row.index, 4, { class: "hollow", "data-tip": `geometric mean ${interval(row.geometric)}` }) : null);
    })),
  html("p", { class: "key" }, html("span", {}, "filled: ratio of sums"), html("span", {}, "hollow: geometric mean"), html("span", {}, "faint: one question each"), rows.some((row) => row.detectable !== null) ? html("span", {}, html("i", { class: "swatch unseen" }), "too small to notice in this run") : null));
  numbers("forest", ["strategy", "Σ ratio", "geometric mean", "per token", "detectable", "questions"], rows.map((row) =>
    [row.name, interval(row.speedup), interval(row.geometric), interval(row.perToken), row.detectable === null ? "–" : `${fixed(row.detectable)}×`, String(row.ratios.length)]));
}

let measureShown = null;
/** The measures of quality at hand: name → strategy → [estimate, low, high] or null. */
function qualities() {
  const found = new Map();
  if (data.strategies.some((strategy) => strategy.quality)) found.set("quality (all measures)", (strategy) => strategy.quality);
  const names = new Set(data.strategies.flatMap((strategy) => Object.keys(strategy.measures)));
  if (names.size > 1) for (const name of names)
    found.set(name, (strategy) => (name in strategy.measures ? [strategy.measures[name], null, null] : null));
  if (data.strategies.some((strategy) => strategy.similarity !== null))
    found.set("similarity to plain", (strategy) =>
      strategy.baseline ? [1, null, null] : strategy.similarity === null ? null : [strategy.similarity, null, null]);
  return found;
}

function scatter(place, width, strategies) {
  const measures = qualities();
  if (!measures.has(measureShown)) measureShown = measures.keys().next().value;
  const value = measures.get(measureShown);
  const points = value ? strategies.map((row) => ({ row, x: row.seconds, y: value(row) })).filter((p) => p.y && p.x !== null) : [];
  if (!points.length) return empty(place, "No measure of quality in this run.");
  const height = Math.max(260, Math.min(360, width * 0.7)), left = 40, right = width - 12, bottom = height - 42;
  const ys = points.flatMap((point) => point.y.filter((end) => end !== null));
  const [low, high] = extent(ys), room = Math.max(0.04, (high - low) * 0.15);
  const x = linear(0, Math.max(...points.map((point) => point.x)) * 1.12, left, right);
  const y = linear(Math.max(0, low - room), Math.min(1, high + room) + (high >= 1 ? 0.02 : 0), bottom, 22);
  const best = points.filter((point) => !points.some((other) => other !== point &&
    other.x <= point.x && other.y[0] >= point.y[0] && (other.x < point.x || other.y[0] > point.y[0])));
  best.sort((a, b) => a.x - b.x);
  const stairs = best.map((point, i) => (i ? `H${x(point.x)}V${y(point.y[0])}` : `M${x(point.x)},${y(point.y[0])}`)).join("");
  const taken = [];
  const label = (point) => { // beside its mark where there is room, never over another label
    const text = fit(point.row.name, right - left - 10), wide = measure(text), px = x(point.x), py = y(point.y[0]);
    const tries = [[12, 4], [-wide - 12, 4], [-wide / 2, -14], [-wide / 2, 24], [12, -14], [-wide - 12, -14], [12, 22], [-wide - 12, 22], [-wide / 2, 40], [-wide / 2, -30]]
      .map(([dx, dy]) => ({ x: Math.min(Math.max(left + 2, px + dx), right - wide), y: py + dy }));
    const free = (box) => box.y > 10 && box.y < bottom - 4 && taken.every((other) =>
      box.x > other.x + other.wide + 4 || box.x + wide + 4 < other.x || Math.abs(box.y - other.y) > 14) &&
      points.every((other) => Math.abs(y(other.y[0]) - (box.y - 4)) > 12 || x(other.x) < box.x - 7 || x(other.x) > box.x + wide + 7);
    const chosen = tries.find(free);
    if (!chosen) return null; // the legend below names it
    taken.push({ ...chosen, wide });
    return svg("text", { x: chosen.x, y: chosen.y, class: `name s${point.row.index}` }, text);
  };
  const labels = points.map(label);
  const select = html("select", { on: { change: (event) => { measureShown = event.target.value; scatter(place, width, strategies); place.querySelector("select").focus(); } } },
    [...measures.keys()].map((name) => html("option", { selected: name === measureShown ? "" : null }, name)));
  place.replaceChildren(...[
    measures.size > 1 ? html("label", { class: "inline" }, "Quality as ", select) : null,
    canvas(width, height, `Seconds per answer against ${measureShown}`,
      axisBelow(x, ticks(...x.domain, width / 80), bottom, 22, "seconds per answer"),
      axisLeft(y, ticks(...y.domain, 5), left, right, measureShown),
      svg("path", { d: stairs, class: "pareto" }),
      points.map((point) => point.y[1] === null ? null :
        svg("line", { x1: x(point.x), x2: x(point.x), y1: y(point.y[1]), y2: y(point.y[2]), class: `whisker thin s${point.row.index}` })),
      points.map((point) => mark(x(point.x), y(point.y[0]), point.row.index, 6.5, { "data-tip": `${point.row.name}: ${seconds(point.x)}, ${measureShown} ${fixed(point.y[0])}` })),
      labels),
    labels.includes(null) ? legend(points.map((point) => point.row), true) : null].filter(Boolean));
  numbers("scatter", ["strategy", "seconds per answer", ...measures.keys()], strategies.map((row) =>
    [row.name, fixed(row.seconds, 3), ...[...measures.values()].map((get) => (get(row) ? fixed(get(row)[0], 3) : "–"))]));
}

function category(place, width, strategies) {
  const rows = rivals(strategies);
  if (!rows.length) return empty(place, "There is no plain decoding to compare with.");
  const gap = 28, columns = Math.max(1, Math.min(4, Math.floor((width + gap) / (250 + gap)), data.categories.length));
  const panel = (width - gap * (columns - 1)) / columns, bar = 9, step = 20, top = 24;
  const cells = rows.flatMap((row) => Object.values(row.categories).map((cell) => cell.speedup).filter(Boolean));
  const highest = Math.max(1, ...cells.flatMap((cell) => [cell[0], Math.min(cell[2] || 0, cell[0] * 1.6)])) * 1.02;
  const x = linear(0, highest, 0, panel - 40);
  const height = top + rows.length * step + 12;
  place.replaceChildren(html("div", { class: "panels" }, data.categories.map((name) => {
    const questions = Math.max(...rows.map((row) => (row.categories[name] || { questions: 0 }).questions));
    return canvas(panel, height, `Speed-up on ${name}: ` + rows.map((row) => `${row.name} ${interval((row.categories[name] || {}).speedup)}`).join(", "),
      svg("text", { x: 0, y: 13, class: "name" }, fit(name, panel - 70)),
      svg("text", { x: panel, y: 13, "text-anchor": "end", class: "faint" }, `n = ${questions}`),
      svg("line", { x1: x(1), x2: x(1), y1: top - 4, y2: height - 8, class: "one" }),
      rows.map((row, i) => {
        const cell = (row.categories[name] || {}).speedup, y = top + i * step;
        if (!cell) return svg("text", { x: 2, y: y + 9, class: "faint" }, "–");
        const end = Math.min(cell[2] === null ? cell[0] : cell[2], highest);
        return svg("g", { "data-tip": `${row.name}: ${interval(cell)}` },
          svg("rect", { x: 0, y, width: Math.max(1, x(cell[0])), height: bar, rx: 2, class: `bar s${row.index}` }),
          cell[1] === null ? null : svg("line", { x1: x(cell[1]), x2: x(end), y1: y + bar / 2, y2: y + bar / 2, class: "error" }),
          svg("text", { x: Math.max(x(cell[0]), cell[1] === null ? 0 : x(end)) + 6, y: y + 9, class: "value" }, `${fixed(cell[0])}×`));
      }));
  })), legend(rows, false, "dashed: plain decoding"));
  numbers("category", ["category", "strategy", "Σ ratio", "geometric mean", "p", "detectable", "quality", "questions"],
    data.categories.flatMap((name) => rows.map((row) => {
      const cell = row.categories[name] || { questions: 0 };
      return [name, row.name, interval(cell.speedup), interval(cell.geometric), fixed(cell.p, 3), cell.detectable ? `${fixed(cell.detectable)}×` : "–", fixed(cell.quality), String(cell.questions)];
    })));
}

function accepted(place, width, strategies) {
  const rows = strategies.filter((row) => row.histogram.length && !row.baseline);
  if (!rows.length) return empty(place, "No passes were recorded.");
  const most = Math.min(16, Math.max(...rows.flatMap((row) => row.histogram.map(([count]) => count))));
  const gap = 28, columns = width > 520 && rows.length > 1 ? 2 : 1;
  const panel = (width - gap * (columns - 1)) / columns, height = 128, top = 34, bottom = height - 24;
  const shares = rows.map((row) => {
    const total = row.histogram.reduce((sum, [, times]) => sum + times, 0), bins = new Array(most + 1).fill(0);
    for (const [count, times] of row.histogram) bins[Math.min(count, most)] += times / total;
    return bins;
  });
  const first = shares.some((bins) => bins[0]) ? 0 : 1, slots = most + 1 - first;
  const highest = Math.max(...shares.flat()), slot = panel / slots, wide = Math.min(30, slot * 0.72);
  const y = linear(0, highest, bottom, top + 6);
  place.replaceChildren(html("div", { class: "panels" }, rows.map((row, r) =>
    canvas(panel, height, `${row.name}: ${shares[r].map((share, count) => (share ? `${count} tokens ${percent(share)}` : "")).filter(Boolean).join(", ")}`,
      svg("text", { x: 0, y: 13, class: "name" }, fit(row.name, panel - measure("mean 0.00") - 14)),
      svg("text", { x: panel, y: 13, "text-anchor": "end", class: "strong" }, `mean ${fixed(row.acceptanceLength)}`),
      svg("line", { x1: 0, x2: panel, y1: bottom, y2: bottom, class: "base" }),
      shares[r].slice(first).map((share, i) => {
        const middle = slot * (i + 0.5), count = i + first;
        return svg("g", { "data-tip": `${count}${count === most && row.histogram.some(([c]) => c > most) ? " or more" : ""} tokens: ${percent(share)} of passes` },
          svg("rect", { x: middle - slot / 2, y: top, width: slot, height: bottom - top, class: "target" }),
          share ? svg("rect", { x: middle - wide / 2, y: Math.min(y(share), bottom - 1), width: wide, height: Math.max(1, bottom - y(share)), rx: 2, class: `bar s${row.index}` }) : null,
          share >= 0.005 && slot > 30 ? svg("text", { x: middle, y: y(share) - 4, "text-anchor": "middle", class: "value" }, percent(share)) : null,
          svg("text", { x: middle, y: bottom + 16, "text-anchor": "middle", class: "faint" }, count === most && most === 16 ? "16+" : String(count)));
      })))), html("p", { class: "key" }, html("span", {}, "across: tokens gained in one pass; up: share of passes")));
  numbers("accepted", ["tokens in a pass", ...rows.map((row) => row.name)], shares[0].map((_, count) =>
    [count === 16 ? "16 or more" : String(count), ...shares.map((bins) => percent(bins[count]))]).slice(first));
}

function positions(place, width, strategies) {
  const rows = strategies.filter((row) => row.positions.length);
  if (!rows.length) return empty(place, "No strategy guessed ahead in this run.");
  const deepest = Math.min(16, Math.max(...rows.map((row) => row.positions.length)));
  const height = 250, left = 44, right = width - 12, bottom = height - 42;
  const x = linear(1, Math.max(2, deepest), left + 10, right - 10), share = ([offered, confirmed]) => confirmed / offered;
  const top = Math.min(1, Math.ceil(4.2 * Math.max(0.2, ...rows.flatMap((row) => row.positions.slice(0, deepest).map(share)))) / 4), y = linear(0, top, bottom, 24);
  place.replaceChildren(canvas(width, height, "Share of confirmed guesses by position in the block",
    axisBelow(x, Array.from({ length: deepest }, (_, i) => i + 1), bottom, bottom, "position in the block", String),
    axisLeft(y, ticks(0, top, 4), left, right, "confirmed up to here", percent),
    rows.map((row) => svg("path", { class: `line s${row.index}`, d: row.positions.slice(0, deepest).map((pair, i) => `${i ? "L" : "M"}${x(i + 1)},${y(share(pair))}`).join("") })),
    rows.map((row) => row.positions.slice(0, deepest).map((pair, i) =>
      mark(x(i + 1), y(share(pair)), row.index, 3.6, { "data-tip": `${row.name}: guess ${i + 1} confirmed ${pair[1]} times of ${pair[0]} (${percent(share(pair))})` })))),
  legend(rows, true));
  numbers("positions", ["position", ...rows.map((row) => row.name)], Array.from({ length: deepest }, (_, i) =>
    [String(i + 1), ...rows.map((row) => (row.positions[i] ? `${row.positions[i][1]} / ${row.positions[i][0]}` : "–"))]));
}

/** The seconds of a forward pass against its tokens, [[tokens, seconds], …]: measured before the run, or else its own steps. */
function stepPrices(bins) {
  if (data.latency.length > 1) return data.latency;
  const often = new Map();
  for (const bin of bins) if (!often.has(bin.tokens) || often.get(bin.tokens).count < bin.count) often.set(bin.tokens, bin);
  return [...often.values()].sort((a, b) => a.tokens - b.tokens).map((bin) => [bin.tokens, bin.time]);
}

/** Flat while tokens are free, then in proportion to them: {first, ridge, at}, or null where steps of one size ran. */
function roof(prices) {
  const [tokens, first] = prices[0], [most, last] = prices[prices.length - 1];
  if (most <= tokens || last <= first) return null;
  return { first, ridge: (most * first) / last, at: (n) => Math.max(first, (n * last) / most) };
}

function roofline(place, width, strategies) {
  const rows = strategies.filter((row) => row.steps.length);
  if (!rows.length) return empty(place, "No steps were recorded.");
  const means = rows.map((row) => {
    const steps = row.steps.reduce((sum, [, count]) => sum + count, 0);
    return { row, steps, tokens: row.steps.reduce((sum, [tokens, count]) => sum + tokens * count, 0) / steps,
      time: row.steps.reduce((sum, [, count, time]) => sum + time * count, 0) / steps };
  });
  const bins = rows.flatMap((row) => row.steps.map(([tokens, count, time]) => ({ row, tokens, count, time })));
  const widest = 1.3 * Math.max(4, ...bins.map((bin) => bin.tokens)), prices = stepPrices(bins), over = roof(prices);
  const curve = data.latency.filter(([tokens]) => tokens <= widest);
  const [fastest, slowest] = extent([...bins.map((bin) => bin.time), ...curve.map(([, time]) => time), ...(over ? [over.first] : [])]);
  const height = 300, left = 40, right = width - 14, bottom = height - 42;
  const x = logarithmic(0.9, widest, left, right), y = logarithmic(800 * fastest, 1250 * slowest, bottom, 24);
  const powers = []; for (let n = 1; n <= widest; n *= 2) powers.push(n);
  const corners = over ? [[0.9, over.first], [Math.max(0.9, over.ridge), over.first], [widest, over.at(widest)]].filter(([n]) => n <= widest) : [];
  // The roof may rise out of the figure: it is cut where it does.
  const top = 1.25 * slowest, path = corners.map(([n, time]) => (time > top ? [n * (top / time), top] : [n, time])).map(([n, time], i) => `${i ? "L" : "M"}${x(n)},${y(1000 * time)}`).join("");
  place.replaceChildren(canvas(width, height, "Forward time against tokens in the step: " + means.map((m) => `${m.row.name} ${fixed(m.tokens, 1)} tokens, ${seconds(m.time)}`).join("; "),
    axisBelow(x, powers, bottom, 24, "tokens in a step, all sequences", String),
    axisLeft(y, powerTicks(...y.domain, 7), left, right, "milliseconds per forward pass"),
    path ? svg("path", { class: "roof", d: path }) : null,
    over && over.ridge > 1 && over.ridge < widest ? [svg("circle", { cx: x(over.ridge), cy: y(1000 * over.first), r: 2.5, class: "ridge" }),
      svg("text", { x: x(over.ridge), y: y(1000 * over.first) + 16, "text-anchor": "middle", class: "faint" }, `ridge: ${fixed(over.ridge, over.ridge < 10 ? 1 : 0)} tokens`)] : null,
    curve.length ? svg("path", { class: "curve", d: curve.map(([tokens, time], i) => `${i ? "L" : "M"}${x(tokens)},${y(1000 * time)}`).join("") }) : null,
    bins.map((bin) => svg("circle", { cx: x(bin.tokens), cy: y(1000 * bin.time), r: Math.min(6, 1.6 + Math.sqrt(bin.count) / 12), class: `dot s${bin.row.index}`,
      "data-tip": `${bin.row.name}: ${bin.tokens} tokens, ${seconds(bin.time)}, ${bin.count} steps` })),
    means.map((mean) => mark(x(mean.tokens), y(1000 * mean.time), mean.row.index, 7.5, { class: "big",
      "data-tip": `${mean.row.name}: ${fixed(mean.tokens, 1)} tokens and ${seconds(mean.time)} per step on average` }))),
  legend(rows, true, ...(curve.length ? ["line: latency measured before the run"] : []), ...(over ? ["dashed: roof"] : [])));
  numbers("roofline", ["strategy", "tokens per step", "ms per step", "tokens gained per second of forward"], means.map((mean) =>
    [mean.row.name, fixed(mean.tokens, 1), fixed(1000 * mean.time, 1), fixed(mean.row.shares[1] ? mean.row.tokens / mean.row.shares[1] : null, 1)]));
}

function shares(place, width, strategies) {
  const rows = strategies.filter((row) => row.shares.some((share) => share > 0));
  if (!rows.length) return empty(place, "No times were recorded.");
  const names = ["forward pass", "choosing blocks", "confirming", "rest"], order = [1, 0, 2, 3];
  const step = 46, bottom = rows.length * step + 4;
  const x = linear(0, Math.max(...rows.map((row) => row.shares.reduce((a, b) => a + b, 0))), 0, width - 64);
  place.replaceChildren(canvas(width, bottom + 40, "Seconds per answer by what they were spent on",
    axisBelow(x, ticks(...x.domain, width / 90), bottom, 0, "seconds per answer"),
    rows.map((row, i) => {
      let from = 0;
      const total = row.shares.reduce((a, b) => a + b, 0), y = i * step;
      return svg("g", {},
        svg("text", { x: 0, y: y + 14, class: "name" }, fit(row.name, width - 8)),
        order.map((part, p) => {
          const value = row.shares[part], box = svg("rect", { x: x(from), y: y + 21, width: Math.max(0, x(from + value) - x(from)), height: 14, class: `part p${p}`,
            "data-tip": `${names[p]}: ${seconds(value)} (${percent(value / total)})` });
          from += value;
          return box;
        }),
        svg("text", { x: x(total) + 7, y: y + 32, class: "value" }, seconds(total)));
    })),
  html("p", { class: "key" }, names.map((name, p) => html("span", {}, html("i", { class: `swatch part p${p}` }), name))));
  numbers("shares", ["strategy", ...names], rows.map((row) => [row.name, ...order.map((part) => seconds(row.shares[part]))]));
}

function pace(place, width) {
  const { answers, pauses, change, p, flagged } = data.pace;
  if (!answers.length) return empty(place, "No answer of plain decoding, so nothing tells how steady the machine was.");
  const height = 220, left = 44, right = width - 12, bottom = height - 42;
  const [fast, slow] = extent(answers.map(([, , , time]) => 1000 * time)), room = Math.max(0.05 * slow, 0.2 * (slow - fast));
  const last = Math.max(...answers.map(([order]) => order));
  const x = linear(0, Math.max(1, last), left + 8, right - 8), y = linear(Math.max(0, fast - room), slow + room, bottom, 24);
  const index = data.strategies.findIndex((strategy) => strategy.baseline), name = (question) => data.questions[question].id;
  const clock = (time) => (time < 120 ? seconds(time) : time < 7200 ? `${fixed(time / 60, 1)} min` : `${fixed(time / 3600, 1)} h`);
  const said = `${change < 0 ? "" : "+"}${(100 * change).toFixed(1)} % from start to end (p = ${fixed(p, 3)})${flagged ? ": drifted" : ""}`;
  place.replaceChildren(canvas(width, height, `Milliseconds of plain decoding's steps in the order of the run: ${said}`,
    axisBelow(x, ticks(0, Math.max(1, last), width / 90).filter(Number.isInteger), bottom, bottom, "answers made before, of all strategies", String),
    axisLeft(y, ticks(...y.domain, 4), left, right, "milliseconds per step"),
    pauses.map(([order, time]) => svg("line", { x1: x(order - 0.5), x2: x(order - 0.5), y1: 20, y2: bottom, class: "one", "data-tip": `resumed after a pause of ${clock(time)}` })),
    answers.map(([order, question, started, time, odd]) => svg("circle", { cx: x(order), cy: y(1000 * time), r: odd ? 5 : 3.4, class: odd ? "odd" : `dot s${index}`,
      "data-question": question, "data-tip": `${seconds(time)} per step on question ${name(question)}, ${clock(started)} after the start${odd ? ": far from the usual" : ""}` }))),
  html("p", { class: "key" }, html("span", {}, said), answers.some(([, , , , odd]) => odd) ? html("span", {}, html("i", { class: "swatch odd" }), "far from the usual") : null,
    pauses.length ? html("span", {}, "dashed: resumed") : null));
  numbers("pace", ["answers made before", "question", "after the start", "per step", "", "pause before"], answers.map(([order, question, started, time, odd], i) =>
    [String(order), String(name(question)), clock(started), seconds(time), odd ? "far from the usual" : "",
      pauses.filter(([at]) => at <= order && (!i || at > answers[i - 1][0])).map(([, rest]) => clock(rest)).join(", ") || "–"]));
}

const FIGURES = { forest, scatter, category, accepted, positions, roofline, shares, pace };
