"""Measured tokens per pass against the law for independent guesses, (1 - α^(γ + 1)) / (1 - α) (Leviathan et al. 2023).

    python -m experiments.acceptance_theory [QUESTIONS] [--drafter suffix] [--lengths 1 2 4 8 12] [--output PLOT.svg]

A drafter guesses γ tokens in a row, γ fixed, over the questions of a file. α is the share of guesses that were right
among those that were reached, pooled over all of them; the law then says how many tokens a pass gains if every guess
is right with chance α, independently of the others. Guesses that come in runs, right after right, break that, and how
far is what this shows. Passes whose draft was shorter than γ are left out. The interval is bootstrapped over answers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import decoding
from decoding.cli import exit_code
from decoding.questions import load_questions
from decoding.report.statistics import bootstrap, ratio_of_sums
from decoding.trace import Step


@dataclass(frozen=True)
class Counts:
    """Passes with drafts of one length. right: guesses confirmed, of those `reached` because all before them were;
    gained: tokens."""

    passes: int
    right: int
    reached: int
    gained: int


@dataclass(frozen=True)
class Point:
    """Passes with drafts of one length. alpha: right guesses ÷ guesses reached. measured, expected: tokens per pass.
    interval: of `measured`, 95 %; None if there are too few answers."""

    length: int
    passes: int
    alpha: float
    measured: float
    expected: float
    interval: tuple[float, float] | None = None


def law(alpha: float, length: float) -> float:
    """Expected tokens per pass, bonus token included."""
    return length + 1.0 if alpha >= 1 else (1 - alpha ** (length + 1)) / (1 - alpha)


def counts(trace: Iterable[Step], length: int) -> Counts:
    """What happened in the passes of a trace that drafted `length` tokens."""
    passes = [step for step in trace if not step.prefill and step.drafted == length and step.committed]
    return Counts(
        passes=len(passes),
        right=sum(step.accepted for step in passes),
        reached=sum(min(step.accepted + 1, length) for step in passes),
        gained=sum(step.accepted + 1 for step in passes),
    )


def point(traces: Sequence[Iterable[Step]], length: int) -> Point:
    """What the passes of some answers that drafted `length` tokens say."""
    found = [each for trace in traces if (each := counts(trace, length)).passes]
    passes, right, reached = (sum(getattr(each, name) for each in found) for name in ("passes", "right", "reached"))
    alpha = right / reached if reached else 0.0
    mean = bootstrap(ratio_of_sums, [each.gained for each in found], [each.passes for each in found])
    return Point(
        length,
        passes,
        alpha,
        mean.estimate if passes else 0.0,
        law(alpha, length),
        None if math.isnan(mean.low) else (mean.low, mean.high),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="?", default="default")
    parser.add_argument("--drafter", default="suffix", help="one that drafts chains, in text form")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results" / "acceptance_theory.svg",
        help="the plot (SVG); its figures go beside it as .json",
    )
    options = parser.parse_args()

    lm = decoding.load(options.model, slots=options.streams)
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    prompts = [question.turns[0] for question in load_questions(options.questions, limit=options.limit)]
    points = []
    for length in options.lengths:
        strategy = decoding.Speculative(drafter=options.drafter, draft_length=length)
        lm.forget()
        generations = decoding.generate(prompts, lm, strategy=strategy, params=params)
        points.append(point([generation.trace for generation in generations], length))
        found = points[-1]
        print(
            f"γ = {length:2}: α = {found.alpha:.3f} over {found.passes} passes; {found.measured:.2f} tokens per pass"
            + ("" if found.interval is None else f" [{found.interval[0]:.2f}, {found.interval[1]:.2f}]")
            + f", {found.expected:.2f} by the law ({found.measured / found.expected:.2f})"
            if found.passes
            else f"γ = {length:2}: no pass drafted so many tokens",
            flush=True,
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figures = {"drafter": options.drafter, "model": lm.name, "points": [asdict(each) for each in points]}
    options.output.with_suffix(".json").write_text(json.dumps(figures, indent=1))
    if drawn := [each for each in points if each.passes]:
        plot(drawn, options.drafter, options.output)
    else:
        print(f"no plot is written: {options.drafter} drafted none of these lengths; give shorter ones")


def plot(points: Sequence[Point], drafter: str, path: Path) -> None:
    """Both against γ, as SVG, and the law for some fixed α behind them."""
    width, height, left, below, room = 640, 420, 56, 48, 24
    longest = max(each.length for each in points)
    highest = max(2.0, *(1.1 * max(each.measured, each.expected, *(each.interval or ())) for each in points))

    def place(length: float, tokens: float) -> str:
        x = left + length / longest * (width - left - 2 * room)
        y = height - below - (tokens - 1) / (highest - 1) * (height - below - room)
        return f"{x:.1f},{y:.1f}"

    def line(values: Sequence[tuple[float, float]], style: str) -> str:
        return f'<polyline points="{" ".join(place(*value) for value in values)}" fill="none" {style}/>'

    def label(at: tuple[float, float], text: str, style: str = "", dx: int = 0, dy: int = 0) -> str:
        x, y = place(*at).split(",")
        return f'<text x="{float(x) + dx:.1f}" y="{float(y) + dy:.1f}" {style}>{escape(text)}</text>'

    parts = []
    for alpha in (0.3, 0.5, 0.7, 0.8, 0.9):
        curve = [(length / 4, law(alpha, length / 4)) for length in range(4 * longest + 1)]
        curve = [value for value in curve if value[1] <= highest]
        parts += [line(curve, 'stroke="#ccc"'), label(curve[-1], f"α={alpha}", 'fill="#888" font-size="10"', 3, 3)]
    for length in range(longest + 1):
        parts.append(label((length, 1), str(length), 'text-anchor="middle"', 0, 18))
    for tokens in range(1, int(highest) + 1):
        parts.append(label((0, tokens), str(tokens), 'text-anchor="end"', -8, 4))
    parts += [line([(0, highest), (0, 1), (longest, 1)], 'stroke="#444"')]
    for color, dash, name, values in (
        ("#0b62a3", "", f"measured, {drafter}", [(float(p.length), p.measured) for p in points]),
        ("#c2410c", "5 4", "(1 − α^(γ+1)) / (1 − α), α as measured", [(float(p.length), p.expected) for p in points]),
    ):
        parts.append(line(values, f'stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'))
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"/>' for x, y in (place(*v).split(",") for v in values)
        ]
        parts.append(label((0, highest), name, f'fill="{color}"', 14, 14 + 18 * (dash != "")))
    for p in points:
        if p.interval is not None:
            bar = [(float(p.length), tokens) for tokens in p.interval]
            parts.append(line(bar, 'stroke="#0b62a3" stroke-width="6" stroke-opacity="0.25"'))
    parts.append(label((longest / 2, 1), "guesses in a row, γ", 'text-anchor="middle"', 0, 38))
    parts.append(
        f'<text transform="translate(16 {height / 2}) rotate(-90)" text-anchor="middle">tokens per pass</text>'
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
