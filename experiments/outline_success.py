"""How often a model's outline is one: at least three distinct, usable points, by category of question.

    python -m experiments.outline_success [QUESTIONS] [--model smollm2-135m] [--strategy skeleton] [--streams 8]

QUESTIONS is the shipped suite, which has the nine categories of Vicuna-80, or any file that `decoding compare` takes.
Where questions are labelled (`label;request`, or the suite's own labels), those that a list suits are counted together
as well.

Runs Skeleton-of-Thought with points that end as soon as they begin, so that nearly all the time goes into outlines,
which are made and read exactly as for whole answers of --max-new-tokens. Points that repeat an earlier one or have no
title do not count: the parser drops them. "tokens" are those of an outline; "plain" is the share of questions answered
without points, because the outline had fewer than two.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar

import decoding
from decoding.cli import exit_code
from decoding.engine.block import Commit
from decoding.engine.decoder import Decoder
from decoding.engine.output import Output
from decoding.engine.sequence import Sequence as EngineSequence
from decoding.questions import load_questions
from decoding.strategies import SkeletonOfThought, TokenStrategy, parse
from decoding.types import Generation

ENOUGH = 3
HEAD = f"{'':<20}{'questions':>10}{f'>= {ENOUGH} points':>12}{'points':>10}{'tokens':>10}{'plain':>10}"


@dataclass(frozen=True)
class Silence(TokenStrategy):
    """Ends every answer as soon as it has begun."""

    name: ClassVar[str] = "silence"
    summary: ClassVar[str] = "no text at all, to measure outlines alone"

    @property
    def lossless(self) -> bool:
        return False

    def decoder(self, backend: decoding.LocalBackend) -> Decoder:
        return _End()


class _End(Decoder):
    def commit(self, sequences: Sequence[EngineSequence], output: Output) -> list[Commit]:
        return [Commit((min(sequence.eos),)) for sequence in sequences]


@dataclass(frozen=True)
class Outline:
    """points: how many it had, none for fewer than two. tokens: how long it was."""

    points: int
    tokens: int

    @classmethod
    def of(cls, generation: Generation) -> Outline:
        parts = generation.parts
        points = 0 if "answer" in parts else sum(label.startswith("point") for label in parts)
        return cls(points, len(parts["outline"].tokens) if "outline" in parts else 0)


def row(name: str, outlines: Sequence[Outline]) -> str:
    """One line of the table."""
    points = [outline.points for outline in outlines]
    enough = sum(count >= ENOUGH for count in points) / len(points)
    tokens = fmean(outline.tokens for outline in outlines)
    plain = points.count(0) / len(points)
    return f"{name:<20}{len(points):>10}{enough:>12.0%}{fmean(points):>10.1f}{tokens:>10.0f}{plain:>10.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="?", default="default")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--strategy", default="skeleton")
    parser.add_argument("--streams", type=int, default=8, help="questions at once")
    parser.add_argument("--max-new-tokens", type=int, default=768, help="of the answers that outlines are made for")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    strategy = parse(arguments.strategy)
    if not isinstance(strategy, SkeletonOfThought):
        parser.error(f"{arguments.strategy} makes no outlines; name a skeleton strategy.")
    lm = decoding.load(arguments.model)
    questions = load_questions(arguments.questions, limit=arguments.limit)
    groups: dict[str, list[Outline]] = defaultdict(list)
    params = decoding.SamplingParams(max_new_tokens=arguments.max_new_tokens)
    for first in range(0, len(questions), arguments.streams):
        batch = questions[first : first + arguments.streams]
        prompts = [question.turns[0] for question in batch]
        answers = decoding.generate(prompts, lm, strategy=replace(strategy, expand=Silence()), params=params)
        for question, generation in zip(batch, answers, strict=True):
            outline = Outline.of(generation)
            groups[question.category].append(outline)
            if question.list_type is not None:
                groups["a list suits it" if question.list_type else "no list suits it"].append(outline)
    print(HEAD)
    print("\n".join(row(name, outlines) for name, outlines in groups.items()))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
