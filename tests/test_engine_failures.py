"""What fails, is cancelled or asks for nonsense ends alone, and the engine serves the others and the next."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

import numpy as np
import pytest
import torch

from decoding.engine.block import Block, Commit
from decoding.engine.confirm import confirm
from decoding.engine.decoder import Decoder
from decoding.engine.engine import Engine
from decoding.engine.output import Output
from decoding.engine.packing import Row
from decoding.engine.runner import Runner
from decoding.engine.sequence import Sequence
from decoding.errors import ContextOverflow, InvalidRequest
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.types import SamplingParams
from tests.greedy import VOCAB, greedy_reference, prompts, run
from tests.tiny import tiny_model


class FailsOn(AutoregressiveDecoder):
    """Raises when asked about a prompt that begins with 13."""

    def __init__(self, where: str) -> None:
        self.where = where

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        self._fail("plan", sequences)
        return super().plan(sequences)

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        self._fail("commit", sequences)
        return confirm(output)

    def _fail(self, where: str, sequences: List[Sequence]) -> None:
        if self.where == where and any(s.prompt[0] == 13 and len(s.new_tokens) > 2 for s in sequences):
            raise RuntimeError("unlucky")


@pytest.mark.parametrize("where", ["plan", "commit", "forward", "nan", "hook", "guess"])
def test_a_failing_sequence_fails_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=4, capacity=64))
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    good, bad = prompts(3), [13, 14, 15]
    plain = engine.runner.forward
    decoder: Decoder = FailsOn(where)

    def sabotaged(rows: List[Row]) -> torch.Tensor:
        guilty = [row for row in rows if engine.cache.tokens[row.slot, 0] == 13 and engine.cache.lengths[row.slot] > 5]
        if guilty and where == "forward":
            raise RuntimeError("unlucky")
        logits = plain(rows)
        if guilty and where == "nan":
            logits = logits.clone()
            logits[rows.index(guilty[0])] = float("nan")
        return logits

    def hook(sequence: Sequence, _: List[int]) -> None:
        if len(sequence.new_tokens) > 2:
            raise RuntimeError("unlucky")

    class GuessesNonsense(AutoregressiveDecoder):
        def plan(self, sequences: List[Sequence]) -> list[Block]:
            return [Block([VOCAB + 9000]) if s.prompt[0] == 13 else Block() for s in sequences]

    if where in ("forward", "nan"):
        monkeypatch.setattr(engine.runner, "forward", sabotaged)
    if where == "guess":
        decoder = GuessesNonsense()
    victims = [engine.submit(bad, params, decoder, on_commit=hook if where == "hook" else None)]
    others = [engine.submit(p, params, decoder) for p in good]
    while engine.busy:
        engine.step()
    assert victims[0].finish_reason == "error" and victims[0].error is not None
    assert [s.new_tokens for s in others] == [greedy_reference(model, p, 10) for p in good]
    monkeypatch.undo()
    again = run(engine, [(bad, AutoregressiveDecoder())], params)[0]
    assert again.new_tokens == greedy_reference(model, bad, 10), "the engine must serve the next request"


class Careless(AutoregressiveDecoder):
    """Plans, commits or forgets what nobody can make sense of."""

    def __init__(self, block: object = None, commit: object = None, forgetting: Exception | None = None) -> None:
        self.block, self.committed, self.forgetting = block, commit, forgetting

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        return super().plan(sequences) if self.block is None else [self.block for _ in sequences]  # type: ignore[misc]

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        return confirm(output) if self.committed is None else [self.committed for _ in sequences]  # type: ignore[misc]

    def forget(self, sequence: Sequence) -> None:
        if self.forgetting is not None:
            raise self.forgetting


@pytest.mark.parametrize(
    "decoder",
    [
        Careless(block=7),
        Careless(block=Block(["a"])),  # type: ignore[list-item]
        Careless(block=Block([1, 2], [None, 0])),  # type: ignore[list-item]
        Careless(block=Block([1.5])),  # type: ignore[list-item]
        Careless(commit=7),
        Careless(commit=Commit([-1])),
        Careless(commit=Commit([9999])),
        Careless(block=Block([1, 2]), commit=Commit([1, 2, 3], path=[-3, 9999])),
        Careless(forgetting=RuntimeError("unlucky")),
    ],
    ids=lambda decoder: str(vars(decoder)),
)
def test_nonsense_fails_alone_and_the_next_request_is_served(decoder: Careless) -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=2, capacity=64))
    params, (prompt,) = SamplingParams(max_new_tokens=6, ignore_eos=True), prompts(1)
    for _ in range(2):
        bad = engine.submit([1, 2, 3], params, decoder)
        good = engine.submit(prompt, params, AutoregressiveDecoder())
        while engine.busy:
            engine.step()
        assert bad.finish_reason == "error" and bad.error is not None
        assert good.new_tokens == greedy_reference(model, prompt, 6) and engine.cache.free == 2


@pytest.mark.parametrize("made", [np.array, torch.tensor, tuple])
def test_guesses_may_come_in_any_sequence_of_integers(made: Callable[[list[int]], List[int]]) -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=2, capacity=64))
    prompt, other = prompts(2)
    plain = greedy_reference(model, prompt, 6)

    class Oracle(AutoregressiveDecoder):
        def plan(self, sequences: List[Sequence]) -> list[Block]:
            return [
                Block(made(plain[len(s.new_tokens) :][: s.room]), made([-1, 0, 1, 2, 3][: s.room])) for s in sequences
            ]

        def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
            return confirm(output)

    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    answers = run(engine, [(prompt, Oracle()), (other, AutoregressiveDecoder())], params)
    assert [s.new_tokens for s in answers] == [plain, greedy_reference(model, other, 6)]
    assert sum(t.accepted for t in answers[0].trace) == 4


def test_cancelling_one_request_leaves_the_others_alone() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=2, capacity=64))
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    sequences = [engine.submit(p, params, AutoregressiveDecoder()) for p in prompts(4)]
    for _ in range(3):
        engine.step()
    engine.cancel(sequences[0])
    engine.cancel(sequences[3])  # still waiting
    while engine.busy:
        engine.step()
    assert [s.finish_reason for s in sequences] == ["cancelled", "length", "length", "cancelled"]
    assert [s.new_tokens for s in sequences[1:3]] == [greedy_reference(model, s.prompt, 12) for s in sequences[1:3]]
    assert engine.cache.free == 2


def test_bad_requests_say_what_is_wrong() -> None:
    engine = Engine(Runner(tiny_model("llama"), slots=1, capacity=16))
    decoder = AutoregressiveDecoder()
    with pytest.raises(InvalidRequest, match="empty"):
        engine.submit([], SamplingParams(), decoder)
    with pytest.raises(ContextOverflow, match="shorten"):
        engine.submit([3] * 16, SamplingParams(), decoder)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        engine.submit([10**6], SamplingParams(), decoder)
    with pytest.raises(InvalidRequest, match="logit_bias"):
        engine.submit([3], SamplingParams(logit_bias={10**6: 1.0}), decoder)
