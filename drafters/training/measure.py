"""Measures a trained head in the engine: acceptance length of greedy answers to questions it was not trained on.

    python -m drafters.training.measure eagle3 --head runs/eagle3/head --model smollm2-135m --questions default

Draws no conclusion about speed, which depends on the machine; `decoding compare` measures that. What it finds is added
to the head's card.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import track

import decoding
from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.drafting import Drafter
from decoding.questions import load_questions
from decoding.trace import speculation
from decoding.types import SamplingParams
from drafters.eagle3 import Eagle3
from drafters.medusa import Medusa

_TOGETHER = 8  # questions answered in one batch


def acceptance_length(
    lm: LocalBackend, drafter: Drafter, questions: list[str], *, draft_length: int, max_new_tokens: int
) -> float:
    """Tokens per verification over all answers, bonus token included."""
    strategy = decoding.Speculative(drafter=drafter, draft_length=draft_length)
    params = SamplingParams(max_new_tokens=max_new_tokens)
    steps = []
    for at in track(range(0, len(questions), _TOGETHER), str(drafter)):
        answers = decoding.generate([*questions[at : at + _TOGETHER]], lm, strategy=strategy, params=params)
        steps += [step for answer in answers for step in answer.trace]
    return speculation(steps).acceptance_length


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m drafters.training.measure", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=("eagle3", "medusa"))
    parser.add_argument("--head", type=Path, help="folder; the shipped head if left out")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", default="default", help="file or suite")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--draft-length", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=16, help="guesses of the tree")
    arguments = parser.parse_args()
    lm = decoding.load(arguments.model)
    folder = None if arguments.head is None else str(arguments.head)
    kind = Eagle3 if arguments.kind == "eagle3" else Medusa
    questions = [q.turns[0] for q in load_questions(arguments.questions, limit=arguments.limit)]
    lines = []
    for drafter in (kind(folder), kind(folder, nodes=arguments.nodes)):
        length = acceptance_length(
            lm, drafter, questions, draft_length=arguments.draft_length, max_new_tokens=arguments.max_new_tokens
        )
        shape = f"tree of {arguments.nodes} guesses" if drafter.nodes else "chain"
        how = f"greedy, {arguments.max_new_tokens} tokens, {arguments.draft_length} levels at most"
        lines.append(
            f"| in the engine, {shape} | acceptance length {length:.3f} ({len(questions)} questions of "
            f"{arguments.questions}, {how}) |"
        )
        print(lines[-1].strip("| "))
    card = arguments.head / "README.md" if arguments.head else None
    if card is not None and card.exists():
        card.write_text(
            card.read_text(encoding="utf-8").rstrip("\n") + "\n" + "\n".join(lines) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
