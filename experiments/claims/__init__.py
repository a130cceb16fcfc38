"""Published claims, each checked on this machine by one short script, and what the scripts share.

Every script prints a claim, what was measured and a verdict, and writes all three with its figures and the machine's
description to `experiments/results/NAME.json`, from which `python -m experiments.index` makes the table of results.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from decoding.backends.local import LocalBackend
from decoding.questions import Question, load_questions
from decoding.report import Environment, Json, environment
from decoding.report.statistics import FEWEST, Array, Interval

Verdict = Literal["holds", "does not hold", "cannot tell"]

RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Finding:
    """What a script found. claim: one sentence; source: who says so. measured: the decisive figures, in words.

    figures: everything measured, as JSON.
    """

    claim: str
    source: str
    measured: str
    verdict: Verdict
    figures: Mapping[str, Json] = field(default_factory=dict)


def above(interval: Interval, threshold: float = 1.0) -> Verdict:
    """Whether the whole interval lies above the threshold ("holds"), below it ("does not hold"), or neither."""
    return "holds" if interval.low > threshold else "does not hold" if interval.high < threshold else "cannot tell"


def gap(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean of `first` minus mean of `second`, measured on different questions (two-sample BCa bootstrap)."""
    estimate = float(np.mean(first) - np.mean(second)) if len(first) and len(second) else np.nan
    if min(len(first), len(second)) < FEWEST:
        return Interval(estimate, np.nan, np.nan)

    def difference(a: Array, b: Array, axis: int) -> Array:
        return np.asarray(a.mean(axis=axis) - b.mean(axis=axis))

    found = stats.bootstrap((first, second), difference, rng=np.random.default_rng(0)).confidence_interval
    return Interval(estimate, float(found.low), float(found.high))


def words(interval: Interval, digits: int = 2) -> str:
    """`1.32 (95 % interval 1.22 to 1.49)`."""
    if not np.isfinite(interval.low):
        return f"{interval.estimate:.{digits}f}"
    return f"{interval.estimate:.{digits}f} (95 % interval {interval.low:.{digits}f} to {interval.high:.{digits}f})"


def arguments(doc: str | None, *, limit: int | None = None, max_new_tokens: int = 64) -> argparse.ArgumentParser:
    """A command line with what the scripts share. limit: questions of each category, if the script asks any."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="(%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON file goes")
    if limit is not None:
        parser.add_argument("--limit", type=int, default=limit, help="questions of each category (%(default)s)")
    return parser


def sample(limit: int, categories: Sequence[str] | None = None) -> list[Question]:
    """The first `limit` questions of each category of the shipped suite."""
    by_category: dict[str, list[Question]] = {}
    for question in load_questions("default", categories=categories):
        by_category.setdefault(question.category, []).append(question)
    return [question for members in by_category.values() for question in members[:limit]]


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in every round; they take turns, and a first round warms up and does not count."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            if number:
                times[way].append(time.perf_counter() - began)
    return times


def crossing(gains: dict[int, float]) -> float | None:
    """The batch at which the gain falls below 1, interpolated between logarithms; None if it does not."""
    points = sorted(gains.items())
    for (small, before), (large, after) in pairwise(points):
        if before >= 1 > after:
            share = math.log(before) / (math.log(before) - math.log(after))
            return small * (large / small) ** share
    return None


def conclude(
    name: str, finding: Finding, options: argparse.Namespace, lm: LocalBackend, *, package: str = __name__
) -> None:
    """Print a finding, and write it to `NAME.json` in the folder of results. package: where the script lies."""
    print(f"claim:    {finding.claim} ({finding.source})\nmeasured: {finding.measured}\nverdict:  {finding.verdict}")
    where: Environment = environment(device=str(lm.device), dtype=str(lm.model.dtype).removeprefix("torch."))
    result = {
        "name": name,
        "command": shlex.join(["python", "-m", f"{package}.{name}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "model": lm.name,
        **asdict(finding),
        "options": {key: value for key, value in vars(options).items() if key != "results"},
        "environment": asdict(where),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    print(f"figures:  {path}")
