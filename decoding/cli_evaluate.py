"""The commands that look at a finished run: `decoding judge | assess`."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from decoding.backends.base import Backend
    from decoding.report.statistics import Interval
    from decoding.report.winrates import Judged


def judge(options: argparse.Namespace, backend: Backend) -> int:
    """Judge a run's answers against plain decoding's, and print what the verdicts add up to."""
    from decoding.judge import Judge, judge_run
    from decoding.report import read_run, run_directory, summarize
    from decoding.types import SamplingParams

    directory = run_directory(options.directory)
    run = read_run(directory)
    params = SamplingParams(max_new_tokens=options.max_new_tokens)
    asked = Judge(backend, options.prompt, options.templates, params)
    console = Console(stderr=True)
    with console.status("judging") as status:
        count = 0

        def progress(_: object) -> None:
            nonlocal count
            count += 1
            status.update(f"judging: {count} pairs done")

        made = judge_run(run, directory, asked, strategies=options.strategies, progress=progress)
    failed = [judgment for judgment in made if judgment.failed]
    for judgment in failed[:1]:
        said = judgment.g1_judgment if judgment.g1_winner == "error" else judgment.g2_judgment
        print(f"{len(failed)} pairs got no verdict, the first of them: {said[-300:]!r}", file=sys.stderr)
    print_account(backend)
    rows = [(row.strategy, judged) for row in summarize(read_run(directory)).strategies for judged in row.judged]
    Console().print(_table(rows))
    print("net: (wins − losses) ÷ pairs, from −1 to 1, with 95 % intervals over questions. strict: a win needs both")
    print("orders; lenient: one order and a tie in the other are enough; length: strict, at equal length.")
    print("first: how often the answer shown first won a game; far from 50 %, the judge looks at the order.")
    return 0


def _table(rows: list[tuple[str, Judged]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in (
        "strategy",
        "judge",
        "win/tie/loss",
        "net, strict",
        "lenient",
        "length",
        "first",
        "longer",
        "failed",
    ):
        table.add_column(column, overflow="fold")
    for strategy, judged in rows:
        strict = judged.strict
        table.add_row(
            Text(strategy),
            Text(judged.judge),
            f"{strict.wins}/{strict.ties}/{strict.losses}",
            signed(strict.net),
            signed(judged.lenient.net),
            signed(judged.length_controlled),
            "–" if math.isnan(judged.first) else f"{judged.first:.0%}",
            "–" if math.isnan(judged.longer) else f"{judged.longer:.2f}×",
            str(judged.errors),
        )
    return table


def signed(interval: Interval) -> str:
    """`+0.12 [−0.05, +0.29]`; without brackets where there is no interval, a dash where there is nothing."""
    if not math.isfinite(interval.estimate):
        return "–"
    if not math.isfinite(interval.low):
        return f"{interval.estimate:+.2f}"
    return f"{interval.estimate:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def assess(options: argparse.Namespace) -> int:
    """Print what can be said about a run's answers without a judge, and write it down beside the records."""
    from decoding.api import load
    from decoding.assess import MEASURES, assess, averages, write_assessments
    from decoding.report import read_run, run_directory

    directory = run_directory(options.directory)
    run = read_run(directory)
    encoder = None
    if options.similarity:
        from decoding.similarity import SentenceEncoder

        encoder = SentenceEncoder(options.encoder)
    lm = None if options.perplexity is None else load(options.perplexity)
    found = assess(run, encoder=encoder, lm=lm, progress=lambda answers: track(answers, console=Console(stderr=True)))
    shown = [name for name in MEASURES if any(getattr(each, name) is not None for each in found)]
    table = Table(box=None, pad_edge=False)
    for column in ("strategy", *shown):
        table.add_column(column, overflow="fold")
    for strategy in run.strategies:
        means = averages(found, strategy)
        table.add_row(Text(strategy), *(f"{means[name]:.3f}" if name in means else "–" for name in shown))
    Console().print(table)
    for name in shown:
        print(f"{name}: {MEASURES[name]}.")
    print(f"figures of every answer: {write_assessments(directory, found)}")
    return 0


def print_account(backend: Backend) -> None:
    """Say on standard error what a server was asked and what it cost; nothing for a local model."""
    from decoding.backends.openai import OpenAIBackend

    if isinstance(backend, OpenAIBackend):
        print(f"{backend.name}: {backend.account()}", file=sys.stderr)
