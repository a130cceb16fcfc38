"""Which of two answers is better, in the eyes of a model: any backend can be the judge.

Every pair is judged in both orders, because judges favour what they read first. The protocol is that of MT-bench
(Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena"), which Skeleton-of-Thought was evaluated
with; the figures are in `decoding.report.winrates`.

A judge cannot tell what it does not know: fluent nonsense may win, and a model judges texts like its own more kindly.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import prompts
from decoding.api import run as run_to_end
from decoding.backends.base import Backend
from decoding.errors import InvalidRequest
from decoding.report.fastchat import write_fastchat
from decoding.report.judgments import Judgment, Winner, append_judgment, read_judgments
from decoding.report.records import BASELINE, AnswerRecord
from decoding.report.runfile import Run
from decoding.report.summary import first_answers
from decoding.strategies.autoregressive import Autoregressive
from decoding.trace import Metrics
from decoding.types import Generation, Message, SamplingParams

_VERDICT = re.compile(
    r"verdict\W{0,8}(?:is\W{1,8})?(?:(?:the\W+)?(?:answer|assistant)\W+)?(?:a +)?(tie|draw|[AB]\b"
    r"(?! +(?:tie|draw|and|or)\b)"  # "A and B are equally good" is no verdict for A
    r"(?-i:(?<!a)|(?! +\w)))\b",  # a small "a" before another word is the article
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Judge:
    """A model that compares answers.

    prompt: a template under `prompts/judge`: "pair" for quality as a whole, or one side of it ("coherence",
    "diversity", "immersion", "integrity", "relevance"). templates: a folder whose templates go before the shipped
    ones. params: for every call; `max_new_tokens` has to leave room for the reasons before the verdict.
    """

    backend: Backend
    prompt: str = "pair"
    templates: str | None = None
    params: SamplingParams = SamplingParams(max_new_tokens=512)

    def __post_init__(self) -> None:
        self.ask("?", "a", "b")  # a template that does not exist or does not work is an error now, not after an hour

    @property
    def identity(self) -> tuple[str, str]:
        """What FastChat calls the judge: model and prompt."""
        return (self.backend.name, self.prompt)

    def ask(self, question: str, answer_a: str, answer_b: str) -> list[Message]:
        """The messages of one game."""
        return prompts.render(
            f"judge/{self.prompt}", folder=self.templates, question=question, answer_a=answer_a, answer_b=answer_b
        ).messages

    async def compare(self, answer: AnswerRecord, other: AnswerRecord) -> Judgment:
        """Judge two answers to the same question in both orders, at the same time.

        A game that fails, or ends without a verdict, has the winner "error" and the cause as its judgment. Equal
        answers are a tie, and nobody is asked.
        """
        judgment = Judgment(
            answer.question_id, answer.strategy, other.strategy, "tie", "tie", self.identity, tstamp=time.time()
        )
        if answer.text == other.text:
            return replace(judgment, g1_judgment="the same text", g2_judgment="the same text")
        asked = (self.ask(answer.question, answer.text, other.text), self.ask(answer.question, other.text, answer.text))
        games = await asyncio.gather(*(self._play(messages) for messages in asked))
        return replace(
            judgment,
            g1_winner=_winner(games[0], "model_1", "model_2"),
            g2_winner=_winner(games[1], "model_2", "model_1"),
            g1_user_prompt=asked[0][-1]["content"],
            g2_user_prompt=asked[1][-1]["content"],
            g1_judgment=games[0].text if games[0].error is None else games[0].error,
            g2_judgment=games[1].text if games[1].error is None else games[1].error,
        )

    async def _play(self, messages: list[Message]) -> Generation:
        try:
            return await self.backend.complete(messages, self.params, Autoregressive())
        except InvalidRequest as error:  # two answers that do not fit the judge's context, say: others do
            return Generation("", [], "error", Metrics(), error=str(error))


def verdict(text: str) -> str | None:
    """The verdict that a judgment ends with: "A", "B", "tie", or None if there is none. The last one counts."""
    found = _VERDICT.findall(text)
    return {"a": "A", "b": "B", "tie": "tie", "draw": "tie"}[found[-1].lower()] if found else None


def judge_run(
    run: Run,
    directory: str | PathLike[str],
    judge: Judge,
    *,
    strategies: Sequence[str] | None = None,
    progress: Callable[[Judgment], object] = lambda judgment: None,
) -> tuple[Judgment, ...]:
    """Judge the answers of a run against plain decoding's, adding judgments beside its records as they are made.

    strategies: by default every one that does not promise plain decoding's answers. Of repeated answers the first is
    judged. Pairs that this judge has judged before are left alone, failed ones excepted, so that an interrupted run
    goes on where it stopped. Questions and answers are written there, too, in FastChat's layout, for its own judge and
    viewers. Returns the judgments made now.

    Raises InvalidRequest if there is nothing to compare.
    """
    plain = first_answers(run, BASELINE)
    chosen = _chosen(run, strategies)
    done = {judgment.pair for judgment in read_judgments(directory) if not judgment.failed}
    pairs = [
        (answer, plain[question])
        for strategy in chosen
        for question, answer in first_answers(run, strategy).items()
        if question in plain and (question, strategy, BASELINE, judge.identity) not in done
    ]
    made: list[Judgment] = []

    async def compare(answer: AnswerRecord, other: AnswerRecord) -> None:
        judgment = await judge.compare(answer, other)
        append_judgment(Path(directory), judgment)
        made.append(judgment)
        progress(judgment)

    async def compare_all() -> None:
        await asyncio.gather(*(compare(answer, other) for answer, other in pairs))

    judge.backend.require(Autoregressive())
    write_fastchat(run, directory)
    run_to_end(compare_all())
    return tuple(made)


def _chosen(run: Run, strategies: Sequence[str] | None) -> list[str]:
    if BASELINE not in run.strategies:
        raise InvalidRequest(f"answers are judged against plain decoding's, but this run has no {BASELINE!r}.")
    others = [name for name in run.strategies if name != BASELINE]
    if strategies is None:
        exact = {record.strategy for record in run.records if record.lossless}
        strategies = [name for name in others if name not in exact]
        if not strategies:
            raise InvalidRequest("every strategy of this run promises plain decoding's answers; name one to judge it.")
    for name in strategies:
        if name not in others:
            raise InvalidRequest(f"this run has no strategy {name!r} to judge; it has: {', '.join(others)}.")
    return list(strategies)


def _winner(game: Generation, first: Winner, second: Winner) -> Winner:
    said = None if game.error is not None else verdict(game.text)
    if said is None:
        return "error"
    return first if said == "A" else second if said == "B" else "tie"
