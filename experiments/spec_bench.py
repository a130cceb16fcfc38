"""Speculative decoding over a file in Spec-Bench's format (Xia et al. 2024), at several batch sizes.

    python -m experiments.spec_bench QUESTIONS.jsonl --drafters mixed suffix "draft-model(model=NAME)" \
        [--batches 1 4 8 16] [--repeats 1] [--per-task 2] [--temperature 0] [--transformers] --output DIR

Plain decoding and every drafter take turns within each group of questions, as many as there are streams, and who
begins moves on from group to group. With --repeats, all of that is done several times, one after the other, and a
question's seconds and tokens are means over repeats. DIR/batch-N holds the records of a run (`decoding report` reads
them, and the same command again resumes one), DIR/answers/N/NAME.jsonl the answers as Spec-Bench writes them, and
experiments/results/spec_bench.json the figures. Printed are Spec-Bench's tasks: speed-up over plain decoding,
(Σ tokens ÷ Σ seconds) ÷ the same of plain decoding, with a 95 % interval bootstrapped over questions; the same of
decoding alone, where every turn counts from its first token on, so that what reading a prompt takes is left out;
acceptance length, tokens per target pass with the bonus token; and how many answers, and tokens before their first
difference, are plain decoding's own.

With --transformers, transformers' `generate` makes answers of the same lengths to the same prompts with one stream,
in float32, by itself, with prompt lookup and with the model's first layers as assistant; and every strategy is held
against the fastest of these.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import decoding
from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.comparison import Comparison, execute
from decoding.options import Schedule
from decoding.questions import Question, load_questions
from decoding.report import BASELINE, AnswerRecord, Run, environment, read_run
from decoding.report.measures import first_difference
from decoding.report.statistics import Interval, bootstrap, ratio_of_rates
from decoding.strategies import Speculative, Strategy
from decoding.strategies.base import REGISTRY
from decoding.trace import Metrics
from decoding.types import Message
from experiments.peers.__main__ import Peer
from experiments.spec_bench_answers import accept_lengths, by_turn, slug, turn_metrics, write_answers

MT_BENCH = frozenset({"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"})
"""Categories that Spec-Bench counts as one task, multi-turn conversation."""

MODES = ("plain", "lookup", "assisted")
"""Of transformers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="?", default="default", help="a file in Spec-Bench's format, or a suite")
    parser.add_argument(
        "--drafters",
        nargs="+",
        default=["prompt-lookup", "suffix", "mixed"],
        help="drafters, or strategies, in text form (%(default)s)",
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="float32", help="float32, int8 or int4 (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16], help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="times every answer is made (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--per-task", type=int, default=2, help="questions of each task; 0 for all (%(default)s)")
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument(
        "--transformers", nargs="*", choices=MODES, help="hold against transformers, in these modes (all of them)"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "spec_bench.json")
    options = parser.parse_args()

    questions = chosen(load_questions(options.questions), options.per_task)
    strategies = [decoding.resolve(BASELINE), *(strategy(text) for text in options.drafters)]
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    lm = decoding.load(options.model, weights=options.weights, slots=max(options.batches), capacity=options.capacity)
    console = Console(markup=False)
    figures: dict[str, dict[str, dict[str, object]]] = {}
    for batch in options.batches:
        directory = options.output / f"batch-{batch}"
        comparison = Comparison(questions, strategies, params, Schedule(repeats=options.repeats, streams=batch))
        execute(comparison, lm, directory, resume=directory.exists())
        run = read_run(directory)
        for number, name in enumerate(run.strategies):
            write_answers(run, name, options.output / "answers" / str(batch) / f"{number}-{slug(name)}.jsonl")
        own = run.strategies
        if batch == 1 and options.transformers is not None:
            run = beside_transformers(run, questions, lm, options.transformers or MODES)
        console.print(table(run, f"{batch} {'stream' if batch == 1 else 'streams'}, {lm.name}"))
        figures[str(batch)] = {name: {key: as_json(row) for key, row in rows(run, name).items()} for name in own}
        for name in own[1:]:
            print(f"{name}: {equality(run, name)}", flush=True)
        if theirs := fastest([name for name in run.strategies if name not in own], run):
            for name in own:
                row = rows(run, name, theirs)["overall"]
                figures["1"][name][f"over {theirs}"] = as_json(row)
                print(f"{name}: {_times(row.speedup)} as fast as {theirs}, over all questions", flush=True)
    result = {
        "command": shlex.join(["python", "-m", "experiments.spec_bench", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "model": lm.name,
        "options": {key: value for key, value in vars(options).items() if key not in ("results", "output")},
        "environment": asdict(environment(device=str(lm.device), dtype=str(lm.model.dtype).removeprefix("torch."))),
        "batches": figures,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, default=str)
    options.results.write_text(text + "\n", encoding="utf-8")
    print(f"figures: {options.results}")


def chosen(questions: Sequence[Question], per_task: int) -> list[Question]:
    """The first questions of each task; all of them for 0."""
    counts: dict[str, int] = {}
    kept = []
    for question in questions:
        name = task(question.category)
        counts[name] = counts.get(name, 0) + 1
        if not per_task or counts[name] <= per_task:
            kept.append(question)
    return kept


def beside_transformers(run: Run, questions: Sequence[Question], lm: LocalBackend, modes: Sequence[str]) -> Run:
    """The run with answers of transformers' `generate` added: in every turn as many tokens as plain decoding made,
    behind the same prompt. Of these, only the time is kept."""
    asked = {question.id: question for question in questions}
    peers = [Peer(f"transformers:{mode}") for mode in modes]
    made: list[AnswerRecord] = []
    try:
        for peer in peers:
            peer.start(Path(), str(lm.model.name_or_path), "")
            peer.ask([], [[1] * 8], 8, record=False)
            if peer.absent:
                print(f"{peer.name} is absent: {peer.absent}")
        for plain in run:
            if plain.strategy == BASELINE and not plain.failed:
                turns = list(_prompts(asked[str(plain.question_id)], plain, lm))
                made += [record for peer in peers if (record := _timed(peer, plain, turns)) is not None]
    finally:
        for peer in peers:
            peer.stop()
    return replace(run, records=(*run.records, *made))


def _prompts(question: Question, record: AnswerRecord, lm: LocalBackend) -> Iterable[tuple[list[int], int]]:
    """Of every turn: the prompt, earlier answers included, and how many tokens followed."""
    messages: list[Message] = []
    for text, said, (_, count, _) in zip(question.turns, record.turns or [record.text], by_turn(record), strict=False):
        messages.append({"role": "user", "content": text})
        yield lm.encode(messages), count
        messages.append({"role": "assistant", "content": said})


def _timed(peer: Peer, plain: AnswerRecord, turns: Sequence[tuple[list[int], int]]) -> AnswerRecord | None:
    """What it takes a peer; None if it fails."""
    seconds = 0.0
    for ids, count in turns:
        known = len(peer.rates.get(1, []))
        peer.ask([], [ids], count, record=True)
        if len(peer.rates.get(1, [])) == known:
            print(f"{peer.name} failed: {peer.absent or peer.notes.get(1, 'no answer')}")
            return None
        seconds += count / peer.rates[1][-1]
    tokens = sum(count for _, count in turns)
    metrics = Metrics(seconds=seconds, new_tokens=tokens)
    return replace(plain, strategy=peer.name, text="", tokens=(), metrics=metrics, trace=(), parts={}, turns=())


def fastest(names: Sequence[str], run: Run) -> str | None:
    """Of these strategies, the one with the most tokens per second."""
    rates = {name: rows(run, name).get("overall") for name in names}
    return max((row.tokens_per_second, name) for name, row in rates.items() if row)[1] if any(rates.values()) else None


def strategy(text: str) -> Strategy:
    """A drafter's name, or a strategy's."""
    name, drafters = text.partition("(")[0].strip(), decoding.drafting.names()
    if name in drafters:
        return Speculative(drafter=text)
    if name not in REGISTRY:
        raise decoding.UnknownName("drafter or strategy", name, [*drafters, *REGISTRY])
    return decoding.resolve(text)


def task(category: str) -> str:
    """Spec-Bench's task of a category."""
    return "mt_bench" if category in MT_BENCH else category


@dataclass(frozen=True)
class Row:
    """One strategy on one task. decoding: the speed-up behind every turn's first token. length: tokens committed per
    pass and sequence after prefill."""

    speedup: Interval
    decoding: Interval
    length: float
    tokens_per_second: float


def as_json(row: Row) -> dict[str, object]:
    """A row's figures; no interval where there are too few questions for one."""
    return {
        "speedup": row.speedup.estimate,
        "interval": _ends(row.speedup),
        "decoding": row.decoding.estimate,
        "decoding_interval": _ends(row.decoding),
        "acceptance_length": row.length,
        "tokens_per_second": row.tokens_per_second,
    }


def _ends(interval: Interval) -> list[float] | None:
    return None if np.isnan(interval.low) else [interval.low, interval.high]


def rows(run: Run, name: str, base: str = BASELINE) -> dict[str, Row]:
    """Per task, and "overall"; questions that both this strategy and `base` have answered."""
    pairs = _pairs(run, name, base)
    tasks: dict[str, list[tuple[AnswerRecord, AnswerRecord]]] = {}
    for record, reference in pairs:
        tasks.setdefault(task(record.category), []).append((record, reference))
    return {key: _row(members) for key, members in [*tasks.items(), ("overall", pairs)] if members}


def _pairs(run: Run, name: str, base: str) -> list[tuple[AnswerRecord, AnswerRecord]]:
    """A strategy's answers, each with the one of `base` to the same question in the same repeat."""
    theirs = {(record.question_id, record.repeat): record for record in run if record.strategy == base}
    both = [(r, theirs.get((r.question_id, r.repeat))) for r in run if r.strategy == name and not r.failed]
    return [(record, reference) for record, reference in both if reference is not None and not reference.failed]


def _row(pairs: Sequence[tuple[AnswerRecord, AnswerRecord]]) -> Row:
    repeats: dict[int | str, list[list[float]]] = {}
    for pair in pairs:
        figures = [value for r in pair for value in (r.metrics.seconds, r.metrics.new_tokens, *_behind_prompts(r))]
        repeats.setdefault(pair[0].question_id, []).append(figures)
    # Repeats of a question say nothing about other questions: the bootstrap draws their means.
    means = np.array([np.mean(each, axis=0) for each in repeats.values()]).T
    seconds, tokens, decoding, decoded, slow, theirs, slow_decoding, theirs_decoded = means
    lengths = [length for record, _ in pairs for length in accept_lengths(record)]
    return Row(
        speedup=bootstrap(ratio_of_rates, slow, theirs, seconds, tokens),
        decoding=bootstrap(ratio_of_rates, slow_decoding, theirs_decoded, decoding, decoded),
        length=float(np.mean(lengths)) if lengths else 0.0,
        tokens_per_second=float(tokens.sum() / seconds.sum()),
    )


def _behind_prompts(record: AnswerRecord) -> tuple[float, int]:
    """Seconds and tokens behind the first token of every turn."""
    turns = turn_metrics(record)
    seconds = sum(turn.seconds - turn.first_token_seconds for turn in turns)
    return seconds, sum(max(0, turn.new_tokens - 1) for turn in turns)


def table(run: Run, title: str) -> Table:
    """Spec-Bench's table: a column per task."""
    figures = {name: rows(run, name) for name in run.strategies}
    tasks = list(dict.fromkeys(key for row in figures.values() for key in row if key != "overall"))
    caption = "speed-up [95 % interval], acceptance length; decoding: without reading prompts"
    shown = Table("", *tasks, "overall", "decoding", "tokens/s", title=title, caption=caption)
    for name, row in figures.items():
        cells = [_cell(row[key]) if key in row else "" for key in [*tasks, "overall"]]
        last = (_times(row["overall"].decoding), f"{row['overall'].tokens_per_second:.1f}") if "overall" in row else ()
        shown.add_row(name, *cells, *last)
    return shown


def _cell(row: Row) -> str:
    return f"{_times(row.speedup)}\n{row.length:.2f}" if row.length else _times(row.speedup)


def _times(interval: Interval) -> str:
    known = "" if np.isnan(interval.low) else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{interval.estimate:.2f}×{known}"


def equality(run: Run, name: str) -> str:
    """How many answers have plain decoding's tokens, and how many tokens stand behind a first difference."""
    same = compared = tokens = differing = 0
    for record, reference in _pairs(run, name, BASELINE):
        at = first_difference(record.tokens, reference.tokens)
        compared += 1
        same += at is None
        tokens += len(reference.tokens)
        differing += 0 if at is None else max(len(record.tokens), len(reference.tokens)) - at
    return f"{same} of {compared} answers identical to plain decoding's; {differing} of {tokens} tokens differ"


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
