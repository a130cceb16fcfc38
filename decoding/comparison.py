"""The main job: the same questions answered by several strategies, interleaved, recorded and summed up."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path

from decoding import quality
from decoding.api import resolve, run
from decoding.assembly import assembled_metrics
from decoding.backends.base import Backend
from decoding.backends.local import LocalBackend
from decoding.config import DEFAULT_STRATEGIES, RunConfig, params_to_json
from decoding.errors import InvalidRequest
from decoding.memory import PeakMemory
from decoding.options import Schedule
from decoding.questions import UNCATEGORIZED, Question, load_questions
from decoding.report import AnswerRecord, Environment, Json, RecordWriter, Run, RunHeader, environment, read_run
from decoding.report.runfile import write_text
from decoding.strategies import Strategy
from decoding.trace import Metrics, shifted
from decoding.types import Generation, Message, SamplingParams

Progress = Callable[["Question | None", "Strategy", "AnswerRecord | None"], None]
"""Called before an answer (record None) and after it, for answers found when resuming only after; with no question
while warming up."""

CONFIG = "config.toml"
"""Name of the run file within a run directory; `decoding compare --config` takes it."""

LATENCY_TOKENS, LATENCY_CONTEXT = (1, 2, 4, 8, 16, 32, 64), 128
"""Tokens per step for which the header of a run holds the backend's forward time, and the tokens behind them."""


@dataclass(frozen=True)
class Comparison:
    """What to run: every strategy answers every question.

    params: for every request, but the seed: each answer's own is made from `params.seed`, the question's id and the
    repeat, so that it does not depend on which other questions are asked.
    """

    questions: Sequence[Question]
    strategies: Sequence[Strategy]
    params: SamplingParams
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        names = [str(strategy) for strategy in self.strategies]
        for name in names:
            if names.count(name) > 1:
                raise InvalidRequest(f"the strategy {name} is listed twice; list it once and raise the repeats.")
        if not self.questions or not self.strategies:
            raise InvalidRequest("a comparison needs at least one question and one strategy.")
        ids = [question.id for question in self.questions]
        if len(set(ids)) < len(ids):
            raise InvalidRequest("two questions have the same id; an answer must be known by its question's.")

    @classmethod
    def of(cls, config: RunConfig) -> Comparison:
        """Read the questions that a configuration names, and put it all together."""
        questions = load_questions(config.questions, limit=config.limit, categories=config.categories)
        return cls(questions, config.parsed_strategies(), config.params, config.schedule)

    def config(self) -> dict[str, Json]:
        """Everything here that decides tokens and times, as JSON."""
        asked = json.dumps([asdict(question) for question in self.questions])
        return {
            "strategies": [str(strategy) for strategy in self.strategies],
            "params": params_to_json(self.params),
            "schedule": asdict(self.schedule),
            "question_ids": [question.id for question in self.questions],
            "questions_hash": hashlib.sha256(asked.encode()).hexdigest()[:16],
        }


def compare(
    questions: str | PathLike[str] | Sequence[str | Question],
    lm: Backend,
    *,
    strategies: Strategy | str | Sequence[Strategy | str] = DEFAULT_STRATEGIES,
    params: SamplingParams | None = None,
    schedule: Schedule | None = None,
    output: str | PathLike[str] | None = None,
) -> Run:
    """Answer questions with several strategies, side by side.

    questions: prompts, `Question`s, the name of a shipped suite, or a file. strategies: one or several. output: a
    directory for the records, which must not hold any yet; without one they are kept in memory alone.

    The result is a sequence of `AnswerRecord`s with `to_pandas()` and `to_polars()`; a notebook shows its table,
    `decoding.report.summarize` computes all figures.
    """
    if isinstance(questions, (str, PathLike)):
        asked = load_questions(questions)
    else:
        asked = [
            question if isinstance(question, Question) else Question(str(number), UNCATEGORIZED, (question,))
            for number, question in enumerate(questions, start=1)
        ]
    several = [strategies] if isinstance(strategies, (str, Strategy)) else strategies
    comparison = Comparison(asked, [resolve(s) for s in several], params or SamplingParams(), schedule or Schedule())
    with tempfile.TemporaryDirectory() if output is None else contextlib.nullcontext(output) as directory:
        execute(comparison, lm, Path(directory))
        return read_run(directory)


def execute(
    comparison: Comparison,
    backend: Backend,
    output: Path,
    *,
    config: RunConfig | None = None,
    resume: bool = False,
    progress: Progress = lambda question, strategy, record: None,
) -> tuple[str, ...]:
    """Run a comparison, appending every answer to the records in `output` as soon as it is there.

    Strategies take turns within each question, the first one moving on from question to question, so that
    a machine that slows down slows all of them down. Nothing is reused from one answer to the next.
    config: how the comparison was written down; kept in the header, and as a run file beside the records. With
    `resume`, complete answers found in `output` are not made again. Returns what had to be mended in the records found
    there, one sentence each.
    """
    for strategy in comparison.strategies:
        backend.require(strategy)
    written = {"model": backend.name} if config is None else config.to_json()
    header = RunHeader.create({**written, **comparison.config()}, _environment(backend), _latency(backend))
    with RecordWriter(output, header, resume=resume) as writer:
        if config is not None:
            write_text(output / CONFIG, config.to_toml())
        todo = [(turn, missing) for turn in _turns(comparison) if (missing := turn.missing(writer))]
        asked = {question.id: question for question in comparison.questions}
        strategies = {str(strategy): strategy for strategy in comparison.strategies}
        for found in writer.done.values():
            progress(asked[str(found.question_id)], strategies[found.strategy], found)
        if todo:
            _warm_up(comparison, backend, progress)
        clock = _Clock(writer)
        for turn, missing in todo:
            for question in missing:
                progress(question, turn.strategy, None)
            time.sleep(comparison.schedule.cool_down)
            backend.forget()
            started = clock.seconds()
            with PeakMemory(backend) as memory:
                answers = run(_answer_all(comparison, backend, turn, missing))
            for question, turns in zip(missing, answers, strict=True):
                record = AnswerRecord.of(
                    joined(turns),
                    question_id=question.id,
                    category=question.category,
                    question="\n\n".join(question.turns),
                    strategy=str(turn.strategy),
                    repeat=turn.repeat,
                    turns=[generation.text for generation in turns],
                    seed=_seed(comparison.params, question, turn.repeat),
                    lossless=turn.strategy.lossless and comparison.params.temperature == 0,
                    pieces=backend.pieces,
                    peak_memory=memory.peak,
                    quality=_quality(question, turns),
                    started=started,
                    order=writer.written,
                )
                writer.append(record)
                progress(question, turn.strategy, record)
        return writer.notices


@dataclass(frozen=True)
class _Turn:
    """One strategy's turn: it answers some questions at once."""

    questions: Sequence[Question]
    strategy: Strategy
    repeat: int

    def missing(self, writer: RecordWriter) -> list[Question]:
        return [q for q in self.questions if (q.id, str(self.strategy), self.repeat) not in writer.done]


def _turns(comparison: Comparison) -> Iterator[_Turn]:
    strategies = list(comparison.strategies)
    streams = comparison.schedule.streams
    for repeat in range(comparison.schedule.repeats):
        for start in range(0, len(comparison.questions), streams):
            shift = (repeat + start // streams) % len(strategies)
            for strategy in strategies[shift:] + strategies[:shift]:
                yield _Turn(comparison.questions[start : start + streams], strategy, repeat)


class _Clock:
    """Seconds since the run was created, on the wall clock: a resumed run goes on where time is, not at 0."""

    def __init__(self, writer: RecordWriter) -> None:
        last = max((record.started + record.metrics.seconds for record in writer.done.values()), default=0.0)
        since = datetime.now(timezone.utc) - datetime.fromisoformat(writer.header.created)
        self._before = max(last, since.total_seconds())  # never back, whatever was done to the machine's clock
        self._began = time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began


def _environment(backend: Backend) -> Environment:
    if isinstance(backend, LocalBackend):
        runner = backend.engine.runner
        return environment(
            device=str(backend.device),
            dtype=str(backend.model.dtype).removeprefix("torch."),
            kernels=runner.kernels,
            compile_seconds=runner.compile_seconds,
        )
    return environment(device=backend.name)


def _latency(backend: Backend) -> list[tuple[int, float]]:
    """(tokens, seconds) of a step over one sequence, where the backend knows."""
    model = getattr(backend, "latency", None)
    return (
        [] if model is None else [(tokens, float(model.cost(tokens, 1, LATENCY_CONTEXT))) for tokens in LATENCY_TOKENS]
    )


def _warm_up(comparison: Comparison, backend: Backend, progress: Progress) -> None:
    """Short unrecorded answers of each strategy: the first pass through any code is slow."""
    short = comparison.params.but(max_new_tokens=min(16, comparison.params.max_new_tokens), min_new_tokens=0)
    for strategy in comparison.strategies:
        for _ in range(comparison.schedule.warm_up):
            progress(None, strategy, None)
            with contextlib.suppress(InvalidRequest):  # about this question; it is recorded where it belongs
                run(strategy.answer(comparison.questions[0].turns[0], short, backend))


def _seed(params: SamplingParams, question: Question, repeat: int) -> int:
    return params.seed + zlib.crc32(f"{question.id} {repeat}".encode())


async def _answer_all(
    comparison: Comparison, backend: Backend, turn: _Turn, questions: Sequence[Question]
) -> list[list[Generation]]:
    async def answer(question: Question) -> list[Generation]:
        params = comparison.params.but(seed=_seed(comparison.params, question, turn.repeat))
        return await answer_turns(question, turn.strategy, backend, params)

    return await asyncio.gather(*(answer(question) for question in questions))


def _quality(question: Question, turns: Sequence[Generation]) -> dict[str, float]:
    """The question's own measure, averaged over the turns that have a reference; a turn without an answer has 0."""
    texts = [generation.text for generation in turns] + [""] * (len(question.turns) - len(turns))
    scores = [score for i, text in enumerate(texts) if (score := quality.score(question, text, turn=i)) is not None]
    return {question.check: sum(scores) / len(scores)} if scores and question.check else {}


async def answer_turns(
    question: Question, strategy: Strategy, backend: Backend, params: SamplingParams
) -> list[Generation]:
    """Answer the turns of a question; each sees the earlier turns and this strategy's own answers to them.

    One generation per turn, on one clock. A turn that fails is the last.
    """
    began = time.perf_counter()
    messages: list[Message] = []
    turns: list[Generation] = []
    for text in question.turns:
        messages.append({"role": "user", "content": text})
        offset = time.perf_counter() - began
        try:
            generation = await strategy.answer(messages, params, backend)
        except InvalidRequest as error:  # a question that does not fit, say: the others do not suffer
            generation = Generation("", [], "error", Metrics(), error=str(error))
        turns.append(replace(generation, trace=shifted(generation.trace, offset)))
        if generation.error is not None:
            break
        messages.append({"role": "assistant", "content": generation.text})
    return turns


def joined(turns: Sequence[Generation]) -> Generation:
    """The answers to all turns of a conversation as one generation, with their parts; a single one stays as it is."""
    if len(turns) == 1:
        return turns[0]
    trace = [step for generation in turns for step in generation.trace]
    seconds = sum(generation.metrics.seconds for generation in turns)
    first = turns[0].metrics.first_token_seconds
    parts: dict[str, Generation] = {}
    for number, generation in enumerate(turns, start=1):
        parts.update({f"turn {number}, {label}": part for label, part in generation.parts.items()})
        if not generation.parts:
            parts[f"turn {number}"] = generation
    return Generation(
        text="\n\n".join(generation.text for generation in turns),
        tokens=[token for generation in turns for token in generation.tokens],
        finish_reason=turns[-1].finish_reason,
        metrics=replace(assembled_metrics(turns, trace, seconds=seconds), first_token_seconds=first),
        trace=trace,
        error=turns[-1].error,
        parts=parts,
    )
