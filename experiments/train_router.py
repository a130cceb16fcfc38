"""Trains the router's classifier on questions labelled `label;request`, and says what it is worth.

    python -m experiments.train_router [QUESTIONS] [--model smollm2-135m] [--test FILE] [--output HEAD.safetensors]
    python -m experiments.train_router --evaluate classifier --test FILE [--labels FILE]
    python -m experiments.train_router --evaluate prompt --test default

A label of 1 means that a list of points which can be written independently suits the question. QUESTIONS is the
shipped suite unless another file is named. The features are the served model's own hidden states; the head is logistic
regression with a penalty chosen by cross-validation, trained in seconds. Printed are accuracy, precision and recall
beside those of routing nothing ("always no"): cross-validated, and by category on the files given as --test, which must
not hold questions that were trained on. --evaluate takes the shipped head ("classifier"), another one (a .safetensors
file) or any router in text form. --labels names a `label;request` file for --test files that have categories and no
labels, such as FastChat's `question.jsonl`. Latency is the wall-clock time of one decision.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import decoding
from decoding.cli import exit_code
from decoding.errors import InvalidRequest
from decoding.questions import Question
from decoding.strategies.router import Classifier, Router, as_router
from decoding.strategies.router.classifier import Head, HeadCard, model_mark, question_features
from experiments.sot_vicuna import chosen

FOLDS, ORDERS = 5, 3
PENALTIES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
ALL = "all"
COLUMNS = f"{'category':<20}{'questions':>10}{'accuracy':>10}{'precision':>11}{'recall':>8}{'always no':>11}{'ms':>6}"


@dataclass(frozen=True)
class Scores:
    """How a router does on labelled questions. Precision and recall are of the label 1."""

    questions: int
    accuracy: float
    precision: float
    recall: float
    always_no: float

    @classmethod
    def of(cls, chosen: Sequence[bool], labels: Sequence[bool]) -> Scores:
        right = sum(a == b for a, b in zip(chosen, labels, strict=True))
        both = sum(a and b for a, b in zip(chosen, labels, strict=True))
        return cls(
            len(labels),
            right / len(labels),
            both / max(sum(chosen), 1),
            both / max(sum(labels), 1),
            labels.count(False) / len(labels),
        )

    def __str__(self) -> str:
        return (
            f"{self.questions} questions: accuracy {self.accuracy:.1%}, precision {self.precision:.1%}, "
            f"recall {self.recall:.1%}; always no {self.always_no:.1%}"
        )


@dataclass(frozen=True)
class Decision:
    """What a router chose for a labelled question, and how long that took, in seconds."""

    question: Question
    skeleton: bool
    seconds: float

    @property
    def right(self) -> bool:
        return self.skeleton == self.question.list_type


def read(source: str, labels: str | None = None) -> list[Question]:
    """Questions of which each has a label, its own or that of another file."""
    questions = chosen(source, labels, only_lists=False)
    if any(question.list_type is None for question in questions):
        raise InvalidRequest(
            f"{source} does not say of every question whether a list suits it; name a label;request file (--labels)."
        )
    return questions


def fit(features: torch.Tensor, labels: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [features] and bias [] of logistic regression on standardised features, for features as they come.

    features: [questions, features] float64. labels: [questions] 0 or 1. penalty: times the weights' squared norm.
    """
    mean, scale = features.mean(dim=0), (features.std(dim=0) + 1e-6) * features.shape[1] ** 0.5
    inputs = (features - mean) / scale
    weight = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight[:-1] + weight[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        value = value + penalty * (weight[:-1] ** 2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = weight.detach()
    return found[:-1] / scale, found[-1] - (found[:-1] / scale * mean).sum()


def cross_validated(features: torch.Tensor, labels: torch.Tensor, penalty: float) -> tuple[list[torch.Tensor], float]:
    """Logits of every question from heads that have not seen it, once per random order, and their mean log loss."""
    every = []
    for order in range(ORDERS):
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(order))
        logits = torch.zeros(len(labels), dtype=torch.float64)
        for fold in range(FOLDS):
            held = shuffled[fold::FOLDS]
            kept = torch.ones(len(labels), dtype=torch.bool)
            kept[held] = False
            weight, bias = fit(features[kept], labels[kept], penalty)
            logits[held] = features[held] @ weight + bias
        every.append(logits)
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    return every, statistics.mean(float(loss(logits, labels)) for logits in every)


def train(lm: decoding.LocalBackend, source: str, layers: Sequence[int]) -> Head:
    """A head for `lm`, trained on all questions of `source`; its card holds the cross-validated scores."""
    questions = read(source)
    answers = [bool(question.list_type) for question in questions]
    features = torch.stack([question_features(lm, question.turns[0], layers)[0] for question in questions]).double()
    labels = torch.tensor(answers, dtype=torch.float64)
    best = min(PENALTIES, key=lambda penalty: cross_validated(features, labels, penalty)[1])
    every, loss = cross_validated(features, labels, best)
    scores = Scores.of([bool(logit > 0) for logits in every for logit in logits], answers * ORDERS)
    print(f"penalty {best:g}, log loss {loss:.3f}; cross-validated on {scores}")
    weight, bias = fit(features, labels, best)
    card = HeadCard(
        model=lm.name,
        layers=tuple(layers),
        questions=len(questions),
        positive=sum(answers),
        accuracy=round(scores.accuracy, 4),
        precision=round(scores.precision, 4),
        recall=round(scores.recall, 4),
        always_no=round(scores.always_no, 4),
        source=source,
    )
    return Head(card, weight.float(), bias.float(), model_mark(lm))


async def decide(lm: decoding.Backend, router: Router, questions: Sequence[Question]) -> list[Decision]:
    """Route every question, one after the other."""
    decisions = []
    for question in questions:
        began = time.perf_counter()
        route = await router.route(question.turns[0], [], lm)
        decisions.append(Decision(question, route.skeleton, time.perf_counter() - began))
    return decisions


def table(decisions: Sequence[Decision]) -> str:
    """Scores and median latency by category, and of all questions together."""
    groups: dict[str, list[Decision]] = {}
    for decision in decisions:
        groups.setdefault(decision.question.category, []).append(decision)
    if len(groups) > 1:
        groups[ALL] = list(decisions)
    return "\n".join([COLUMNS, *(_line(category, group) for category, group in groups.items())])


def _line(category: str, group: Sequence[Decision]) -> str:
    labels = [bool(decision.question.list_type) for decision in group]
    scores = Scores.of([decision.skeleton for decision in group], labels)
    return (
        f"{category:<20}{scores.questions:>10}{scores.accuracy:>10.1%}{scores.precision:>11.1%}{scores.recall:>8.1%}"
        f"{scores.always_no:>11.1%}{1000 * statistics.median(decision.seconds for decision in group):>6.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="?", default="router")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", help="decoder layers passed; 16, 18, 20 of 30, or alike")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="label;request files to evaluate on")
    parser.add_argument("--output", type=Path, help="where to write the head (.safetensors; its card goes beside it)")
    parser.add_argument("--evaluate", metavar="ROUTER", help="evaluate this head, or router in text form, only")
    parser.add_argument("--labels", metavar="FILE", help="label;request, for --test files without labels of their own")
    parser.add_argument("--wrong", action="store_true", help="list the questions that went astray")
    arguments = parser.parse_args()
    tests = {file: read(file, arguments.labels) for file in arguments.test}
    if not arguments.evaluate:
        known = {question.turns[0] for question in read(arguments.questions)}
        for file, questions in tests.items():
            if known & {question.turns[0] for question in questions}:
                raise InvalidRequest(f"{file} holds questions to train on; scores on those would mean nothing.")
    elif not tests:
        parser.error("--evaluate needs questions to evaluate on: --test FILE.")
    lm = decoding.load(arguments.model)
    router: Router
    if arguments.evaluate:
        named = arguments.evaluate
        router = Classifier(head=named) if named.endswith(".safetensors") else as_router(named)
    else:
        depth = int(lm.engine.runner.config.num_hidden_layers)
        head = train(lm, arguments.questions, arguments.layers or [round(depth * part / 30) for part in (16, 18, 20)])
        path = arguments.output or Path("router.safetensors")
        head.save(path)
        print(f"wrote {path} and {path.with_suffix('.json')}")
        router = Classifier(head=str(path))
    for file in arguments.test:
        decisions = asyncio.run(decide(lm, router, tests[file]))
        print(f"\n{router} on {file}\n{table(decisions)}")
        if arguments.wrong:
            wrong = [decision.question for decision in decisions if not decision.right]
            print("\n".join(f"{int(bool(question.list_type))}  {question.turns[0]}" for question in wrong))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
