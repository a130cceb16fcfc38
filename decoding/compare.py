"""The main job: the same questions answered by several strategies, interleaved, recorded and summed up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from decoding import quality
from decoding.api import run
from decoding.assembly import assembled_metrics
from decoding.backends.base import Backend
from decoding.backends.local import LocalBackend
from decoding.errors import InvalidRequest
from decoding.memory import PeakMemory
from decoding.questions import Question
from decoding.report import AnswerRecord, Json, RecordWriter, RunHeader, environment
from decoding.strategies import Strategy
from decoding.trace import Metrics, shifted
from decoding.types import Generation, Message, SamplingParams

Progress = Callable[["Question | None", "Strategy", "AnswerRecord | None"], None]
"""Called before an answer (record None) and after it; with no question while warming up."""


@dataclass(frozen=True)
class Comparison:
    """What to run.

    questions, strategies: every strategy answers every question. params: for every request; the seed of a
    question is `params.seed` plus its place. repeats: times each answer is made. streams: questions
    answered at the same time, in one batch.
    """

    questions: Sequence[Question]
    strategies: Sequence[Strategy]
    params: SamplingParams
    repeats: int = 1
    streams: int = 1

    def __post_init__(self) -> None:
        names = [str(strategy) for strategy in self.strategies]
        for name in names:
            if names.count(name) > 1:
                raise InvalidRequest(f"the strategy {name} is listed twice; list it once and raise the repeats.")
        for value, what in ((self.repeats, "repeats"), (self.streams, "streams")):
            if value < 1:
                raise InvalidRequest(f"{what} must be at least 1, not {value}.")
        if not self.questions or not self.strategies:
            raise InvalidRequest("a comparison needs at least one question and one strategy.")

    def config(self, backend: Backend, questions_from: str) -> dict[str, Json]:
        """Everything that decides the tokens, as JSON."""
        bias: dict[str, Json] = {str(token): value for token, value in self.params.logit_bias.items()}
        params: dict[str, Json] = asdict(self.params) | {"stop": list(self.params.stop), "logit_bias": bias}
        return {
            "model": backend.name,
            "questions": questions_from,
            "question_ids": [question.id for question in self.questions],
            "strategies": [str(strategy) for strategy in self.strategies],
            "params": params,
            "repeats": self.repeats,
            "streams": self.streams,
        }


def execute(
    comparison: Comparison, backend: Backend, output: Path, *, questions_from: str, resume: bool, progress: Progress
) -> None:
    """Run a comparison, appending every answer to the records in `output` as soon as it is there.

    Strategies take turns within each question, the first one moving on from question to question, so that
    a machine that slows down slows all of them down. Nothing is reused from one answer to the next.
    """
    for strategy in comparison.strategies:
        backend.require(strategy)
    if isinstance(backend, LocalBackend):
        where = environment(device=str(backend.device), dtype=str(backend.model.dtype).removeprefix("torch."))
    else:
        where = environment(device=backend.name)
    header = RunHeader.create(comparison.config(backend, questions_from), where)
    began = time.perf_counter()
    with RecordWriter(output, header, resume=resume) as writer:
        _warm_up(comparison, backend, progress)
        order = len(writer.done)
        for group, strategy, repeat in _turns(comparison):
            missing = [q for q in group if (q.id, str(strategy), repeat) not in writer.done]
            if not missing:
                continue
            for question in missing:
                progress(question, strategy, None)
            started = time.perf_counter() - began
            backend.forget()
            with PeakMemory(backend) as memory:
                generations = run(_answer_all(comparison, backend, strategy, missing))
            for question, generation in zip(missing, generations, strict=True):
                score = quality.score(question, generation.text)
                record = AnswerRecord.of(
                    generation,
                    question_id=question.id,
                    category=question.category,
                    question="\n\n".join(question.turns),
                    strategy=str(strategy),
                    repeat=repeat,
                    lossless=strategy.lossless and comparison.params.temperature == 0,
                    pieces=backend.pieces,
                    peak_memory=memory.peak,
                    quality={} if score is None or question.check is None else {question.check: score},
                    started=started,
                    order=order,
                )
                writer.append(record)
                order += 1
                progress(question, strategy, record)


def _turns(comparison: Comparison) -> Iterator[tuple[Sequence[Question], Strategy, int]]:
    strategies = list(comparison.strategies)
    for repeat in range(comparison.repeats):
        for start in range(0, len(comparison.questions), comparison.streams):
            shift = (repeat + start // comparison.streams) % len(strategies)
            for strategy in strategies[shift:] + strategies[:shift]:
                yield comparison.questions[start : start + comparison.streams], strategy, repeat


def _warm_up(comparison: Comparison, backend: Backend, progress: Progress) -> None:
    """One short unrecorded answer per strategy: the first pass through any code is slow."""
    short = comparison.params.but(max_new_tokens=min(16, comparison.params.max_new_tokens), min_new_tokens=0)
    for strategy in comparison.strategies:
        progress(None, strategy, None)
        with contextlib.suppress(InvalidRequest):  # about this question; it is recorded where it belongs
            run(strategy.answer(comparison.questions[0].turns[0], short, backend))


async def _answer_all(
    comparison: Comparison, backend: Backend, strategy: Strategy, questions: Sequence[Question]
) -> list[Generation]:
    places = {question.id: place for place, question in enumerate(comparison.questions)}

    async def answer(question: Question) -> Generation:
        params = comparison.params.but(seed=comparison.params.seed + places[question.id])
        try:
            return await answer_turns(question, strategy, backend, params)
        except InvalidRequest as error:  # a question that does not fit, say: the others do not suffer
            return Generation("", [], "error", Metrics(), error=str(error))

    return await asyncio.gather(*(answer(question) for question in questions))


async def answer_turns(question: Question, strategy: Strategy, backend: Backend, params: SamplingParams) -> Generation:
    """Answer all turns of a question; each sees the earlier turns and this strategy's own answers to them."""
    began = time.perf_counter()
    messages: list[Message] = []
    turns: dict[str, Generation] = {}
    for number, turn in enumerate(question.turns, start=1):
        messages.append({"role": "user", "content": turn})
        offset = time.perf_counter() - began
        generation = await strategy.answer(messages, params, backend)
        turns[f"turn {number}"] = replace(generation, trace=shifted(generation.trace, offset))
        if generation.error is not None or len(question.turns) == 1:
            break
        messages.append({"role": "assistant", "content": generation.text})
    generations = list(turns.values())
    if len(generations) == 1:
        return generations[0]
    trace = [step for generation in generations for step in generation.trace]
    parts = {
        f"{label}, {part}": generation
        for label, turn_generation in turns.items()
        for part, generation in (turn_generation.parts or {"": turn_generation}).items()
    }
    return Generation(
        text="\n\n".join(generation.text for generation in generations),
        tokens=[token for generation in generations for token in generation.tokens],
        finish_reason=generations[-1].finish_reason,
        metrics=assembled_metrics(
            generations, trace, seconds=sum(generation.metrics.seconds for generation in generations)
        ),
        trace=trace,
        error=generations[-1].error,
        parts={label.removesuffix(", "): part for label, part in parts.items()},
    )
