"""How often a model's outline is one: at least three distinct, usable points, by category of question.

    python -m experiments.outline_success [QUESTIONS] [--model smollm2-135m] [--strategy skeleton] [--streams 8]

Runs Skeleton-of-Thought with one token per point, so that nearly all the time goes into outlines, which are made and
read exactly as for whole answers. Points that repeat an earlier one or have no title do not count: the parser drops
them. "plain" is the share of questions answered without points, because the outline had fewer than two.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import decoding
from decoding.questions import load_questions
from decoding.strategies import SkeletonOfThought, parse
from decoding.types import Generation

ENOUGH = 3


def points(generation: Generation) -> int:
    """How many points the answer's outline had; fewer than two are none."""
    return 0 if "answer" in generation.parts else sum(label.startswith("point") for label in generation.parts)


def row(name: str, counts: Sequence[int]) -> str:
    """One line of the table."""
    enough = sum(count >= ENOUGH for count in counts) / len(counts)
    plain = counts.count(0) / len(counts)
    return f"{name:<20}{len(counts):>10}{enough:>12.0%}{sum(counts) / len(counts):>10.1f}{plain:>10.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="?", default="default")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--strategy", default="skeleton")
    parser.add_argument("--streams", type=int, default=8, help="questions at once")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    strategy = parse(arguments.strategy)
    if not isinstance(strategy, SkeletonOfThought):
        parser.error(f"{arguments.strategy} makes no outlines; name a skeleton strategy.")
    lm = decoding.load(arguments.model)
    questions = load_questions(arguments.questions, limit=arguments.limit)
    groups: dict[str, list[int]] = defaultdict(list)
    for first in range(0, len(questions), arguments.streams):
        batch = questions[first : first + arguments.streams]
        prompts = [question.turns[0] for question in batch]
        params = decoding.SamplingParams(max_new_tokens=strategy.max_points)
        answers = decoding.generate(prompts, lm, strategy=replace(strategy, point_tokens=1), params=params)
        for question, generation in zip(batch, answers, strict=True):
            groups[question.category].append(points(generation))
            if question.list_type is not None:
                groups["a list suits it" if question.list_type else "no list suits it"].append(points(generation))
    print(f"{'':<20}{'questions':>10}{f'>= {ENOUGH} points':>12}{'points':>10}{'plain':>10}")
    print("\n".join(row(name, counts) for name, counts in groups.items()))


if __name__ == "__main__":
    main()
