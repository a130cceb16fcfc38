// Which step gave which token: the answers' colors and the replay both rest on this.

/** The steps of an answer as objects, times in seconds. */
function stepsOf(answer) {
  const columns = answer.steps;
  return columns.step.map((step, i) => ({
    index: i, step, sequence: columns.sequence[i], start: columns.start[i] / 1e4, end: (columns.start[i] + columns.duration[i]) / 1e4,
    tokens: columns.tokens[i], reused: columns.reused[i], drafted: columns.drafted[i], accepted: columns.accepted[i],
    committed: columns.committed[i], prefill: columns.prefill[i] === 1, drafter: columns.drafters[columns.drafter[i]],
    sources: columns.sources && columns.sources[i] ? columns.sources[i].split(" ") : [],
  }));
}

/** Token pieces of one or more sequences, grouped by the step that gave them: [{step, pieces}]. */
function grouped(pieces, steps) {
  const groups = [];
  let next = 0;
  for (const step of steps) {
    if (!step.committed || next >= pieces.length) continue;
    groups.push({ step, pieces: pieces.slice(next, next + step.committed) });
    next += step.committed;
  }
  // Pieces beyond the trace (an end marker that no step counted) belong to the last step.
  if (next < pieces.length) groups.push({ step: steps.length ? steps[steps.length - 1] : null, pieces: pieces.slice(next) });
  return groups;
}

/** The blocks of text an answer shows: [{label, groups}], one per part, or one for all. */
function blocksOf(answer, steps) {
  const bySequence = (sequences) => sequences.flatMap((sequence) => steps.filter((step) => step.sequence === sequence));
  if (answer.parts.length) {
    return answer.parts.map((part) => ({
      label: part.label,
      groups: part.pieces.length ? grouped(part.pieces, bySequence(part.sequences)) : [{ step: null, pieces: [part.text] }],
    }));
  }
  const sequences = [...new Set(steps.map((step) => step.sequence))];
  const pieces = answer.pieces.length ? answer.pieces : null;
  return [{ label: "", groups: pieces ? grouped(pieces, bySequence(sequences)) : [{ step: null, pieces: [answer.text] }] }];
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** The text that each step of an answer wrote: step → text. */
function written(answer, steps) {
  const texts = new Map();
  for (const block of blocksOf(answer, steps)) for (const { step, pieces } of block.groups)
    if (step) texts.set(step.index, (texts.get(step.index) || "") + pieces.join(""));
  return texts;
}

/** Tokens of a step in the order they were gained: the confirmed guesses by who made them, then the model's own (""). */
function byOrigin(step, pieces) {
  const guessed = Math.min(step.accepted, pieces.length), runs = [];
  pieces.forEach((piece, i) => {
    const guesser = i < guessed ? step.sources[i] || step.drafter || "guess" : "";
    if (!runs.length || runs[runs.length - 1].guesser !== guesser) runs.push({ guesser, pieces: [] });
    runs[runs.length - 1].pieces.push(piece);
  });
  return runs;
}

/** What a reader may want to know about one sequence's share of a step. */
function describe(step, text) {
  const guesses = step.drafted ? `, ${step.accepted} of ${plural(step.drafted, "guess")} confirmed`.replace("guesss", "guesses") : "";
  const who = step.drafter ? ` (${step.drafter})` : "";
  const reused = step.reused ? ` (${step.reused} more were in the cache)` : "";
  const what = step.prefill ? `read ${plural(step.tokens, "prompt token")}${reused}, gained ${step.committed}` : `${plural(step.committed, "token")} gained`;
  const words = text && text.trim() ? ` “${text.trim().length > 60 ? `${text.trim().slice(0, 60)}…` : text.trim()}”` : "";
  return `step ${step.step}, ${seconds(step.end - step.start)} from ${seconds(step.start)}: ${what}${guesses}${who}${words}`;
}

/** Depth of color, 1 to 6, for so many tokens at once. */
const depth = (tokens) => Math.min(6, Math.max(1, tokens));
