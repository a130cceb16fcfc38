"""Skeleton-of-Thought as its paper measured it, on any file of questions, locally or over an API.

    python -m experiments.sot_vicuna question.jsonl [--model smollm2-135m] [--only-lists] [--sweep 1 4 16]
    python -m experiments.sot_vicuna question.jsonl --base-url http://127.0.0.1:8000/v1 --model NAME
    python -m experiments.sot_vicuna --from runs/sot-20260101-120000

Takes FastChat's Vicuna-80, WizardLM's test set, or any other file that `decoding compare` takes. Prints the speed-up
by category, per answer and per token; lengths, with total tokens and critical path apart; the stages; and, with
--sweep, latency and throughput against the number of questions asked at once. The records stay in the run directory,
where `decoding judge` adds verdicts; --from prints the tables of a run again, with them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from statistics import median

import decoding
from decoding.cli import exit_code
from decoding.cli_evaluate import print_account
from decoding.options import LoadOptions, Schedule
from decoding.questions import Question, load_questions
from decoding.report import BASELINE, Run
from experiments.sot_tables import LENGTH, SPEED, STAGE_SECONDS, STAGES, pairs, rows, table, throughput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="?", default="default", help="a question file or a shipped suite")
    parser.add_argument("--from", type=Path, metavar="DIR", dest="directory", help="tables of this run, nothing new")
    parser.add_argument("--strategies", nargs="+", default=["skeleton"], help="beside plain decoding (%(default)s)")
    parser.add_argument("--labels", help="a 'label;request' file: which of the questions want a list")
    parser.add_argument("--only-lists", action="store_true", help="only questions labelled as wanting a list")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=768, help="of plain answers, and of all points together")
    parser.add_argument("--sweep", nargs="+", type=int, default=[], metavar="N", help="ask N questions at once, too")
    parser.add_argument("--output", type=Path, help="run directory (runs/sot-DATE-TIME)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="float32", help="float32, int8 or int4 (%(default)s)")
    parser.add_argument("--slots", type=int, default=64, help="of a local model (%(default)s)")
    parser.add_argument("--base-url", help="an OpenAI-compatible server that has --model")
    parser.add_argument("--api-key-env", metavar="VAR")
    parser.add_argument("--concurrency", type=int, default=64, help="calls of a server at once (%(default)s)")
    options = parser.parse_args()
    if options.directory is not None:
        show(decoding.read_run(options.directory), options.directory)
        return
    questions = chosen(options.questions, options.labels, options.only_lists)[: options.limit]
    if options.base_url is None:
        how = LoadOptions(weights=options.weights, slots=options.slots)
    else:
        how = LoadOptions(base_url=options.base_url, api_key_env=options.api_key_env, concurrency=options.concurrency)
    lm = how.load(options.model)
    output = options.output or Path("runs") / f"sot-{datetime.now():%Y%m%d-%H%M%S}"
    strategies = [BASELINE, *options.strategies]
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens)
    run = decoding.compare(
        questions, lm, strategies=strategies, params=params, schedule=Schedule(repeats=options.repeats), output=output
    )
    show(run, output)
    if options.sweep:
        heads = ("median s/answer", "per answer", "per token", "tokens/s")
        print(f"\n{'at once':>7}  {'strategy':<40} {heads[0]:>15} {heads[1]:>10} {heads[2]:>10} {heads[3]:>9}")
    for streams in options.sweep:
        schedule = Schedule(streams=streams)
        folder = output / f"at-once-{streams}"
        asked = decoding.compare(questions, lm, strategies=strategies, params=params, schedule=schedule, output=folder)
        for strategy in asked.strategies:
            print(f"{streams:>7}  {strategy:<40} {load_line(asked, strategy)}")
    print_account(lm)


def chosen(name: str, labels: str | None, only_lists: bool) -> list[Question]:
    """The questions of a file, with the labels of another one, which are found by the question's text."""
    questions = load_questions(name)
    if labels is not None:
        known = {question.turns[0].strip(): question.list_type for question in load_questions(labels)}
        questions = [replace(q, list_type=known.get(q.turns[0].strip(), q.list_type)) for q in questions]
    if only_lists:
        questions = [question for question in questions if question.list_type]
        if not questions:
            raise SystemExit("no question is labelled as wanting a list; give --labels.")
    return questions


def show(run: Run, directory: Path) -> None:
    """Print the tables of a run, and write their figures beside its records."""
    figures = {}
    for strategy in run.strategies:
        found = rows(run, strategy) if strategy != BASELINE else []
        if not found:
            continue
        figures[strategy] = [_json(asdict(row)) for row in found]
        print(f"\n{strategy}")
        for columns in (SPEED, LENGTH, STAGES, STAGE_SECONDS):
            print(f"\n{table(found, columns)}")
    failures = sum(record.failed for record in run.records)
    print(f"\n{len(run.records)} answers, {failures} of them failed and left out.")
    print("Speed-ups are medians over questions, with 95 % bootstrap intervals; see Row in experiments/sot_tables.py.")
    path = directory / "sot.json"
    path.write_text(json.dumps(figures, indent=1))
    print(f"figures: {path}")


def load_line(run: Run, strategy: str) -> str:
    """Latency, speed-ups and throughput of a strategy in a run of several questions at once."""
    answers = [record for record in run.records if record.strategy == strategy and not record.failed]
    both = pairs(run, strategy)
    per_answer = _median([pair.plain_seconds / pair.seconds for pair in both])
    per_token = _median([pair.plain_seconds / pair.plain_tokens / pair.seconds * pair.tokens for pair in both])
    seconds = _median([record.metrics.seconds for record in answers])
    return f"{seconds:>15.2f} {per_answer:>9.2f}× {per_token:>9.2f}× {throughput(answers):>9.1f}"


def _json(value: object) -> object:
    """The same in JSON, which has no nan."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _median(values: Sequence[float]) -> float:
    return median(values) if values else float("nan")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
