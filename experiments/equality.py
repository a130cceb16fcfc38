"""Everything that claims plain decoding's tokens against plain decoding, token by token, on a real model in float32.

    python -m experiments.equality [--questions FILE] [--limit 64] [--max-new-tokens 96] [--minutes 30]

Each refiner, and each drafter with chains and with trees, answers every question alone and in ragged batches of eight;
drafts have a fixed length, so that there is something to verify in every step. A token that differs from plain
decoding's is excused only where the two tokens' logits, recomputed in float64 for that very prefix, lie within 1e-4 of
each other.

The work is cut into parts, one strategy on eight questions, alone or together. Each is written down when it is done, so
that the same command goes on where it stopped, by itself after `--minutes` or for another reason. Prints one line per
strategy and way, with tokens per forward; when no part is left, the result goes to `experiments/results/equality.json`.
Exits with 1 if a token differs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import track
from transformers import PreTrainedModel

import decoding
from decoding.cli import exit_code
from decoding.errors import RecordError
from decoding.questions import load_questions
from experiments.claims import RESULTS, Finding, conclude

REFINERS = (
    "jacobi",
    "jacobi(block_size=8)",
    "jacobi(block_size=8, recycle=false)",
    "jacobi(block_size=8, initial=iterate, recycle=false)",
    "jacobi(block_size=8, initial=prompt)",
    "jacobi(block_size=8, candidates=3)",
    "jacobi(block_size=16, schedule=gauss-seidel)",
    "jacobi(block_size=16, schedule=hybrid)",
    "jacobi(block_size=8, schedule=gauss-seidel, blocks=3, candidates=2)",
    "lookahead",
    "lookahead(adaptive=false)",
    "lookahead(window=7, ngram=5, guesses=7, adaptive=false)",
)
CHAINS = (
    "speculative",
    "speculative(drafter=suffix, draft_length=8)",
    "speculative(drafter=prompt-lookup, draft_length=8)",
    "speculative(drafter=eagle3, draft_length=4)",
    "speculative(drafter=quantised, draft_length=6)",
    "speculative(drafter=quantised(weights=int4), draft_length=6)",
    "speculative(drafter=layer-skip(layers=20), draft_length=2)",
    "speculative(drafter=draft-model(model=smollm2-135m), draft_length=4)",
    "speculative(drafter=cross-vocabulary(model=smollm2-135m, method=text), draft_length=4)",
)
TREES = (
    "speculative(drafter=token-recycling, draft_length=4)",
    "speculative(drafter=eagle3(nodes=12), draft_length=4)",
    "speculative(drafter=mixed, draft_length=6)",
    "speculative(drafter=mixed(drafters=prompt-lookup+eagle3(nodes=8), nodes=12), draft_length=6)",
    "speculative(drafter=mixed(drafters=suffix+quantised), draft_length=6)",
)
BATCH = 8
TIE = 1e-4


@dataclass(frozen=True)
class Part:
    """One strategy on one group of questions, answered together or each alone."""

    strategy: str
    together: bool
    group: int


@dataclass
class Tally:
    """differing: answers' first wrong tokens. ties: excused ones. tokens, forwards: of all answers, after prefill."""

    differing: int = 0
    ties: int = 0
    tokens: int = 0
    forwards: int = 0

    def add(self, lm: decoding.LocalBackend, prompt: list[int], plain: list[int], answer: decoding.Generation) -> None:
        """Compare an answer with plain decoding's, up to the first difference: what follows has another prefix."""
        if answer.error is not None:
            raise SystemExit(f"a strategy failed: {answer.error}")
        place = next((i for i, (a, b) in enumerate(zip(plain, answer.tokens, strict=False)) if a != b), None)
        if place is not None:
            tie = is_tie(lm.model, [*prompt, *plain[:place]], plain[place], answer.tokens[place])
            self.ties += tie
            self.differing += not tie
        elif len(plain) != len(answer.tokens):
            self.differing += 1
        self.tokens += sum(step.committed for step in answer.trace if not step.prefill)
        self.forwards += answer.metrics.forwards

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.differing + other.differing,
            self.ties + other.ties,
            self.tokens + other.tokens,
            self.forwards + other.forwards,
        )

    def __str__(self) -> str:
        rate = self.tokens / max(1, self.forwards)
        return f"{self.differing} differing, {self.ties} ties in {self.tokens} tokens, {rate:.2f} tokens per forward"


class Record:
    """What is done: plain decoding's answers by group of questions, and a tally of every finished part.

    file: JSON lines, of which the first says what was asked. Raises RecordError if that was something else.
    """

    def __init__(self, file: Path, asked: dict[str, str | int]) -> None:
        self.file = file
        self.plain: dict[int, list[list[int]]] = {}
        self.tallies: dict[Part, Tally] = {}
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append(asked)
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if lines[0] != asked:
            raise RecordError(f"{file} holds answers to something else ({lines[0]}); give another --output.")
        for line in lines[1:]:
            if "plain" in line:
                self.plain[line["group"]] = line["plain"]
            else:
                self.tallies[Part(**line["part"])] = Tally(**line["tally"])

    def answered(self, group: int, plain: list[list[int]]) -> None:
        """Keep plain decoding's answers to a group."""
        self.plain[group] = plain
        self._append({"group": group, "plain": plain})

    def done(self, part: Part, tally: Tally) -> None:
        """Keep the tally of a part."""
        self.tallies[part] = tally
        self._append({"part": asdict(part), "tally": asdict(tally)})

    def total(self, strategy: str, together: bool) -> Tally:
        """Of all finished parts of a strategy."""
        mine = [tally for part, tally in self.tallies.items() if (part.strategy, part.together) == (strategy, together)]
        return sum(mine, Tally())

    def _append(self, line: object) -> None:
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


_precise: dict[int, PreTrainedModel] = {}


@torch.inference_mode()
def is_tie(model: PreTrainedModel, prefix: Sequence[int], one: int, other: int) -> bool:
    """Whether two tokens are the model's best, and equally good, by a plain forward pass in float64."""
    if id(model) not in _precise:
        _precise[id(model)] = copy.deepcopy(model).double()
    logits = _precise[id(model)](torch.tensor([list(prefix)], device=model.device)).logits[0, -1]
    return bool(logits.max() - torch.minimum(logits[one], logits[other]) < TIE)


def run(lm: decoding.LocalBackend, part: Part, prompts: list[list[int]], plain: list[list[int]], tokens: int) -> Tally:
    """Answer a part's questions and compare; nothing is reused from earlier answers."""
    strategy, params = decoding.resolve(part.strategy), decoding.SamplingParams(max_new_tokens=tokens)
    answers: list[decoding.Generation] = []
    for asked in [prompts] if part.together else [[prompt] for prompt in prompts]:
        lm.forget()
        answers += decoding.generate([*asked], lm, strategy=strategy, params=params)
    tally = Tally()
    for prompt, expected, answer in zip(prompts, plain, answers, strict=True):
        tally.add(lm, prompt, expected, answer)
    return tally


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", default="default", help="a question file or a shipped suite")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--strategies", nargs="+", default=[*CHAINS, *TREES, *REFINERS], metavar="STRATEGY")
    parser.add_argument("--minutes", type=float, help="stop after the part during which they have passed")
    parser.add_argument("--output", type=Path, default=Path("runs/equality"), help="folder of finished parts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result goes")
    options = parser.parse_args()
    for strategy in map(decoding.resolve, options.strategies):
        if not strategy.lossless:
            raise SystemExit(f"{strategy} does not claim plain decoding's tokens; there is nothing to compare.")
    began = time.perf_counter()
    lm = decoding.load(options.model, dtype="float32", slots=BATCH, capacity=2048)
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens)
    questions = load_questions(options.questions, limit=options.limit)
    prompts = [lm.encode(q.turns[0])[: lm.engine.cache.capacity - options.max_new_tokens] for q in questions]
    groups = [prompts[at : at + BATCH] for at in range(0, len(prompts), BATCH)]
    asked = {key: getattr(options, key) for key in ("model", "questions", "limit", "max_new_tokens")}
    record = Record(options.output / "parts.jsonl", asked)
    parts = [Part(s, t, g) for t in (True, False) for s in options.strategies for g in range(len(groups))]
    left = [part for part in parts if part not in record.tallies]
    for part in track(left, f"{len(left)} of {len(parts)} parts"):
        if part.group not in record.plain:
            alone = [decoding.generate(prompt, lm, params=params).tokens for prompt in groups[part.group]]
            record.answered(part.group, alone)
        tokens = options.max_new_tokens
        record.done(part, run(lm, part, groups[part.group], record.plain[part.group], tokens))
        if options.minutes is not None and time.perf_counter() - began > 60 * options.minutes:
            break
    return report(record, parts, lm, options)


def report(record: Record, parts: list[Part], lm: decoding.LocalBackend, options: argparse.Namespace) -> int:
    """Print what was found so far; if that is all, write it down. Returns how to exit."""
    found = {
        strategy: {"alone": record.total(strategy, False), "batch": record.total(strategy, True)}
        for strategy in options.strategies
    }
    for strategy, ways in found.items():
        print(strategy, *(f"  {way}: {tally}" for way, tally in ways.items()), sep="\n")
    every = sum((tally for ways in found.values() for tally in ways.values()), Tally())
    left = sum(part not in record.tallies for part in parts)
    if left:
        print(f"{left} of {len(parts)} parts are left; the same command goes on.")
        return int(every.differing > 0)
    finding = Finding(
        claim="every drafter and every exact refiner gives plain decoding's tokens, alone and in ragged batches",
        source="a promise of this project",
        measured=f"{every.differing} of {every.tokens:,} tokens differ, {every.ties} true ties; "
        f"{len(found)} strategies, {options.limit} questions, each alone and in batches of {BATCH}",
        verdict="does not hold" if every.differing else "holds",
        figures={s: {way: asdict(tally) for way, tally in ways.items()} for s, ways in found.items()},
    )
    conclude("equality", finding, options, lm, package="experiments")
    return int(every.differing > 0)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
