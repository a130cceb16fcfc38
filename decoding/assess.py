"""Answers of a run without a judge: figures that no model's taste enters into, and what each of them cannot tell."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from decoding.errors import RecordError
from decoding.quality import coverage, redundancy
from decoding.report.records import BASELINE, AnswerRecord
from decoding.report.runfile import Run
from decoding.report.summary import first_answers

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.similarity import SentenceEncoder

ASSESSMENTS = "assessments.jsonl"
"""Name of the file within a run directory."""

MEASURES: Mapping[str, str] = {
    "similarity": "cosine of sentence vectors with plain decoding's answer; cannot tell which of the two is better, "
    "nor a right answer from a wrong one on the same subject",
    "redundancy": "share of three-word runs of a paragraph that stood in an earlier one; misses what is repeated in "
    "other words",
    "coverage": "share of the question's content words that the answer takes up; cannot tell whether what it says "
    "about them is right",
    "perplexity": "of the answer under the model, given the question, exp(mean −ln p per token); low for fluent and "
    "for repetitive text alike, and says nothing about truth",
}
"""What each figure is, and what it cannot tell."""


@dataclass(frozen=True)
class Assessment:
    """The figures of one answer, see `MEASURES`; None where they were not asked for, or cannot be had."""

    question_id: int | str
    strategy: str
    redundancy: float
    coverage: float
    similarity: float | None = None
    perplexity: float | None = None


def assess(
    run: Run,
    *,
    encoder: SentenceEncoder | None = None,
    lm: LocalBackend | None = None,
    progress: Callable[[Sequence[AnswerRecord]], Iterable[AnswerRecord]] = iter,
) -> tuple[Assessment, ...]:
    """Figures of the first complete answer of every strategy to every question.

    encoder: for the similarity with plain decoding's answer. lm: for the perplexity, the model that gave the answers or
    a better one. progress: wraps the answers that are gone through, as progress bars do.
    """
    plain = first_answers(run, BASELINE)
    answers = [answer for strategy in run.strategies for answer in first_answers(run, strategy).values()]
    return tuple(
        Assessment(
            question_id=answer.question_id,
            strategy=answer.strategy,
            redundancy=redundancy(paragraphs(answer.text)),
            coverage=coverage(answer.question, answer.text),
            similarity=_similarity(encoder, answer, plain.get(answer.question_id)),
            perplexity=None if lm is None else perplexity(lm, answer.question, answer.text),
        )
        for answer in progress(answers)
    )


def averages(assessments: Sequence[Assessment], strategy: str) -> dict[str, float]:
    """Mean over questions of each figure that a strategy has; perplexities are averaged as logarithms."""
    own = [assessment for assessment in assessments if assessment.strategy == strategy]
    means = {}
    for name in MEASURES:
        values = [value for assessment in own if (value := getattr(assessment, name)) is not None]
        if values:
            means[name] = math.exp(fmean(map(math.log, values))) if name == "perplexity" else fmean(values)
    return means


def write_assessments(directory: str | PathLike[str], assessments: Sequence[Assessment]) -> Path:
    """Write one JSON object per answer beside a run's records. Raises RecordError if that cannot be done."""
    path = Path(directory) / ASSESSMENTS
    try:
        path.write_text("".join(json.dumps(asdict(assessment)) + "\n" for assessment in assessments))
    except OSError as error:
        raise RecordError(f"{path} could not be written ({error.strerror or error}).") from error
    return path


def paragraphs(text: str) -> list[str]:
    """An answer's parts as anybody sees them, whichever way they were written: its lines that are not empty."""
    return [line for line in text.split("\n") if line.strip()]


def perplexity(lm: LocalBackend, question: str, answer: str) -> float | None:
    """exp(mean −ln p) of the answer's tokens behind the question. None for an answer without a token, or if the
    question alone fills the model's context; an answer that does not fit is measured as far as it does."""
    prompt, tokens = lm.encode(question), lm.encode(question, answer)
    tokens = tokens[: getattr(lm.model.config, "max_position_embeddings", None)]
    # The question's last token may merge with the answer's first: from where they differ on, it is the answer.
    shared = 0
    while shared < min(len(prompt), len(tokens)) and prompt[shared] == tokens[shared]:
        shared += 1
    if len(tokens) <= shared or shared == 0:
        return None
    ids = torch.tensor([tokens], device=lm.device)
    with torch.inference_mode():
        logits = lm.model(input_ids=ids).logits[0, shared - 1 : -1].float()  # [answer tokens, vocabulary]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, shared:])
    return math.exp(float(loss))


def _similarity(encoder: SentenceEncoder | None, answer: AnswerRecord, plain: AnswerRecord | None) -> float | None:
    return None if encoder is None or plain is None else encoder.similarity(answer.text, plain.text)
