"""The engine: schedule, run, commit, for many sequences and many decoders in one forward pass.

It knows token ids only. The same requests in the same order give the same batches.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from functools import partial
from operator import index
from typing import TypeVar

import torch

from decoding.engine import latency
from decoding.engine.block import Block, Commit, settled
from decoding.engine.decoder import Decoder
from decoding.engine.output import Output
from decoding.engine.packing import Row
from decoding.engine.runner import Runner
from decoding.engine.sequence import CommitHook, Sequence
from decoding.errors import ContextOverflow, InvalidRequest, ModelError
from decoding.trace import Frame, Step
from decoding.types import FinishReason, SamplingParams

T = TypeVar("T")

# A prompt waits for another one that is being read if that will spare it at least this many tokens.
_WORTH_WAITING = 16
# However busy decoding keeps a step, prompts advance by at least this many tokens in it.
_LEAST_PREFILL = 32

# Steps and sequences of all engines of the process: an answer may come from several.
_STEPS, _SEQUENCES = itertools.count(), itertools.count()


class Engine:
    """Decodes sequences on one runner.

    step_tokens: prompts are read in chunks so that a step holds about this many tokens in all; None for as many as the
    latency model says, if there is one already.
    filming: set it, and every step keeps what its block held (`Step.frame`).
    number: the latest step's.
    on_step: told of every forward pass in which sequences only decode: its tokens, sequences, committed tokens behind
    each of them on average, and seconds.
    """

    def __init__(self, runner: Runner, step_tokens: int | None = None) -> None:
        self.runner = runner
        self.cache = runner.cache
        self.step_tokens = latency.step_tokens(runner) if step_tokens is None else step_tokens
        self.filming = False
        self.number = -1
        self._planned = 0, 0  # prompt tokens and sequences that decode, in the step being planned
        self.on_step: Callable[[int, int, float, float], None] | None = None
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self._waiting or self._running)

    def submit(
        self,
        prompt: Tokens[int],
        params: SamplingParams,
        decoder: Decoder,
        eos: Iterable[int] = (),
        on_commit: CommitHook | None = None,
    ) -> Sequence:
        """Queue a sequence. It starts when a slot is free, and is returned by the `step` that ends it.

        Raises InvalidRequest for an empty prompt or ids outside the vocabulary, and ContextOverflow for
        a prompt that leaves no room for a new token.
        """
        prompt = list(prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty; give at least one token.")
        if min(prompt) < 0 or max(prompt) >= self.runner.vocab:
            raise InvalidRequest(f"the prompt holds token ids outside the model's vocabulary of {self.runner.vocab}.")
        capacity = self.cache.capacity
        if len(prompt) >= capacity:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens and a sequence may hold {capacity}; shorten it"
                + (" or load the model with a larger capacity." if capacity < self.runner.context else ".")
            )
        stray = [token for token in params.logit_bias if token >= self.runner.vocab]
        if stray:
            raise InvalidRequest(f"logit_bias names token {stray[0]}, outside the vocabulary of {self.runner.vocab}.")
        sequence = Sequence(
            id=next(_SEQUENCES),
            prompt=prompt,
            params=params,
            decoder=decoder,
            eos=frozenset() if params.ignore_eos else frozenset(eos),
            limit=min(len(prompt) + params.max_new_tokens, capacity),
            submitted=time.perf_counter(),
            on_commit=on_commit,
        )
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now, keeping what it has. Others do not notice. Ended ones stay as they are."""
        if sequence.finish_reason is None:
            self._finish(sequence, "cancelled")

    def step(self) -> list[Sequence]:
        """Run one forward pass and return the sequences that ended in it."""
        began = time.perf_counter()
        self._admit()
        before = list(self._running)
        rows = self._schedule()
        if rows:
            self._run(rows, began)
        return [s for s in before if s.finish_reason is not None]

    def _admit(self) -> None:
        """Give free slots to waiting sequences, first come first served.

        One whose prompt begins like a prompt still being read waits for it, if that saves enough.
        """
        for sequence in list(self._waiting):
            if not self.cache.free:
                return
            cached = int(self.cache.shared_prefix(sequence.prompt_array).max())
            alike = (s for s in self._running if s.reading and s.span == sequence.span == 1)
            coming = max((_common_prefix(s, sequence) for s in alike), default=0)
            if coming - cached >= _WORTH_WAITING:
                continue
            self._waiting.remove(sequence)
            sequence.slot, sequence.reused = self.cache.acquire(sequence.prompt, sequence.span)
            sequence.cached = sequence.reused
            self._running.append(sequence)

    def beside(self, sequences: int) -> int:
        """Tokens in the step being planned beside those of so many sequences that decode: of prompts, and one of every
        other sequence."""
        reading, decode = self._planned
        return reading + max(0, decode - sequences)

    def _schedule(self) -> dict[Sequence, Row]:
        """Choose what every running sequence puts through the model, ordered by decoder.

        Sequences that decode get their decoder's block; prompts share what is left of the step.
        """
        waiting = sum(sequence.pending for sequence in self._running if sequence.reading)
        decode = [sequence for sequence in self._running if not sequence.reading]
        self._planned = min(waiting, max(self.step_tokens - len(self._running), _LEAST_PREFILL)), len(decode)
        blocks: dict[Sequence, Block] = {}
        for decoder, members in _by_decoder(decode):
            for sequence, block in self._contain(members, decoder.plan):
                blocks[sequence] = block
        for sequence in list(blocks):
            try:
                blocks[sequence].check(self.runner.vocab)
                if len(sequence.tokens) + len(blocks[sequence]) + blocks[sequence].suffix > self.cache.capacity:
                    blocks[sequence] = Block()  # no room for the guesses: decode plainly
            except Exception as error:
                del blocks[sequence]
                self._fail(sequence, error)
        left = self.step_tokens - sum(sequence.pending + len(block) for sequence, block in blocks.items())
        left = max(left, _LEAST_PREFILL)
        rows: dict[Sequence, Row] = {}
        for _, members in _by_decoder(self._running):
            for sequence in members:
                if sequence in blocks:
                    pending = sequence.tokens[sequence.cached :]
                    rows[sequence] = Row(sequence.slot, pending, blocks[sequence], span=sequence.span)
                elif left > 0:
                    chunk = sequence.tokens[sequence.cached : _chunk_end(sequence, left)]
                    left -= len(chunk)
                    last = sequence.span == 1 and len(chunk) == sequence.pending
                    rows[sequence] = Row(sequence.slot, chunk, Block(), logits=last, span=sequence.span)
        return rows

    def _run(self, rows: dict[Sequence, Row], began: float) -> None:
        planned = time.perf_counter()
        self.number = next(_STEPS)
        logits = self._forward(rows)
        ran = time.perf_counter()
        gains = {s: _Gain(prefill=s.reading) for s in rows}
        if self.on_step is not None and all(s.span == 1 and not gains[s].prefill for s in rows):
            context = sum(s.cached for s in rows) / max(1, len(rows))
            self.on_step(sum(map(len, rows.values())), len(rows), context, ran - planned)
        judged = [s for s, row in rows.items() if row.logits]
        if judged:
            assert logits is not None
            output = Output.judge(judged, [rows[s].block for s in judged], logits)
            for sequence in output.broken:
                self._fail(sequence, ModelError("the model returned NaN or infinite logits for this sequence."))
            for decoder, members in _by_decoder(s for s in judged if s.finish_reason is None):
                for sequence, commit in self._contain(members, partial(_commit, decoder, output)):
                    try:
                        self._accept(sequence, rows[sequence], commit, output, gains[sequence])
                    except Exception as error:
                        self._fail(sequence, error)
        self.cache.move([move for gain in gains.values() for move in gain.moves])
        for sequence, row in rows.items():
            if not row.logits:
                self._keep(sequence, row, min(sequence.cached + len(row.pending), len(sequence.tokens) - 1))
        self._record(rows, gains, began, planned, ran)
        for sequence, gain in gains.items():
            if gain.ends is not None:
                self._finish(sequence, gain.ends)

    def _forward(self, rows: dict[Sequence, Row]) -> torch.Tensor | None:
        """Logits of the step's rows. If the pass fails, find the sequences that fail alone and drop them."""
        try:
            logits = self.runner.forward(list(rows.values()))
            if logits.is_cuda:
                torch.cuda.current_stream(logits.device).synchronize()
            return logits
        except Exception as error:
            if len(rows) == 1:
                (sequence,) = rows
                rows.clear()
                self._fail(sequence, error)
                return None
        parts = []
        for sequence in list(rows):
            one = {sequence: rows[sequence]}
            part = self._forward(one)
            if not one:
                del rows[sequence]
            elif rows[sequence].logits and part is not None:
                parts.append(part)
        return torch.cat(parts) if parts else None

    def _contain(
        self, sequences: list[Sequence], call: Callable[[list[Sequence]], list[T]]
    ) -> list[tuple[Sequence, T]]:
        """Call a decoder for all its sequences, or, if that raises, for each alone, failing those at fault."""
        try:
            return list(zip(sequences, call(sequences), strict=True))
        except Exception as error:
            if len(sequences) == 1:
                self._fail(sequences[0], error)
                return []
        return [pair for sequence in sequences for pair in self._contain([sequence], call)]

    def _accept(self, sequence: Sequence, row: Row, commit: Commit, output: Output, gain: _Gain) -> None:
        """Append a commit's tokens, up to where the sequence ends."""
        if not commit.tokens and sequence.span == 1:
            raise RuntimeError(f"{type(sequence.decoder).__name__} committed no token in a step.")
        tokens = list(map(index, commit.tokens[: sequence.limit - len(sequence.tokens)]))
        if any(not 0 <= token < self.runner.vocab for token in tokens):
            raise RuntimeError(f"{type(sequence.decoder).__name__} committed a token outside the model's vocabulary.")
        if len(sequence.tokens) + len(tokens) == sequence.limit:
            full = sequence.limit - len(sequence.prompt) < sequence.params.max_new_tokens
            gain.ends = "context" if full else "length"
        for count, token in enumerate(tokens, start=1):
            if token in sequence.eos:
                del tokens[count:]
                gain.ends = "eos"
        if sequence.params.logprobs:
            known = commit.logprobs
            sequence.logprobs += (
                output.logprobs(sequence, commit, len(tokens)) if known is None else known[: len(tokens)]
            )
        gain.accepted = min(len(commit.tokens) - 1, len(tokens)) if sequence.span == 1 else 0
        path = range(gain.accepted) if commit.path is None else commit.path[: gain.accepted]
        if any(not 0 <= node < len(row.block) for node in path):
            raise RuntimeError(f"{type(sequence.decoder).__name__} committed a guess that was not in its block.")
        base = sequence.cached + len(row.pending)  # where the block's first guess was written
        gain.moves = [(sequence.slot, base + node, base + place) for place, node in enumerate(path) if node != place]
        gain.expected = commit.expected
        gain.sources = [commit.sources[node] for node in path] if commit.sources else []
        gain.offered = Counter(name for label in commit.sources for name in label.split("+"))
        if sequence.span == 1:
            self._store(sequence, [*row.pending, *(row.block.tokens[node] for node in path)])
        else:
            gain.written, gain.revised = commit.written, commit.revised
            final = settled(len(sequence.tokens), sequence.span)
            self._keep(sequence, row, final if commit.reuse is None else commit.reuse)
        sequence.tokens += tokens
        sequence.draws += 1
        gain.committed = len(tokens)
        if sequence.on_commit is not None and tokens:
            keep = sequence.on_commit(sequence, tokens)
            if keep is not None:
                del sequence.tokens[len(sequence.tokens) - len(tokens) + keep :]
                del sequence.logprobs[len(sequence.new_tokens) :]
                gain.committed = keep
                gain.ends = "stop"

    def _keep(self, sequence: Sequence, row: Row, length: int) -> None:
        """Count the entries of the first `length` committed tokens; all of them have been written by now."""
        if length < sequence.cached:
            self.cache.truncate(sequence.slot, length)
            sequence.cached = length
        else:
            self._store(sequence, row.pending[: length - sequence.cached])

    def _store(self, sequence: Sequence, tokens: Tokens[int]) -> None:
        self.cache.commit(sequence.slot, tokens)
        sequence.cached += len(tokens)

    def _record(
        self, rows: dict[Sequence, Row], gains: dict[Sequence, _Gain], began: float, planned: float, ran: float
    ) -> None:
        done = time.perf_counter()
        tokens = sum(map(len, rows.values()))
        for sequence, row in rows.items():
            gain = gains[sequence]
            sequence.trace.append(
                Step(
                    step=self.number,
                    sequence=sequence.id,
                    start=began - sequence.submitted,
                    plan=planned - began,
                    forward=ran - planned,
                    commit=done - ran,
                    batch_sequences=len(rows),
                    batch_tokens=tokens,
                    tokens=len(row),
                    drafted=len(row.block) if row.span == 1 else 0,
                    accepted=gain.accepted,
                    committed=gain.committed,
                    prefill=gain.prefill,
                    written=gain.written,
                    revised=gain.revised,
                    reused=0 if sequence.trace else sequence.reused,
                    drafter=sequence.decoder.name if row.block else "",
                    expected=gain.expected,
                    sources=" ".join(gain.sources),
                    offered=" ".join(f"{name}={count}" for name, count in gain.offered.items()),
                    frame=_frame(sequence, row.block, gain) if self.filming else None,
                )
            )

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        sequence.error = error
        self._finish(sequence, "error")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            if reason == "error":
                self.cache.discard(sequence.slot)
            else:
                self.cache.release(sequence.slot)
        try:
            sequence.decoder.forget(sequence)
        except Exception as error:
            sequence.finish_reason, sequence.error = "error", sequence.error or error


@dataclass
class _Gain:
    """What a step brought one sequence. moves: (slot, from, to) cache entries of an accepted tree path. sources: who
    made each accepted guess, offered: how many each made, where the commit says so."""

    prefill: bool
    accepted: int = 0
    committed: int = 0
    moves: list[tuple[int, int, int]] = field(default_factory=list)
    ends: FinishReason | None = None
    written: int = 0
    revised: int = 0
    expected: float = 0.0
    sources: list[str] = field(default_factory=list)
    offered: Counter[str] = field(default_factory=Counter)


def _frame(sequence: Sequence, block: Block, gain: _Gain) -> Frame:
    gained = tuple(sequence.tokens[len(sequence.tokens) - gain.committed :])
    parents = None if block.parents is None else tuple(block.parents)
    return Frame(len(sequence.new_tokens) - gain.committed, tuple(block.tokens), parents, gained)


def _chunk_end(sequence: Sequence, tokens: int) -> int:
    """Where to stop reading a prompt in a step that has room for so many tokens of it: whole stretches only, since the
    tokens of one see each other."""
    if sequence.span == 1:
        return sequence.cached + tokens
    stretches = max(sequence.cached // sequence.span + 1, (sequence.cached + tokens) // sequence.span)
    return min(stretches, len(sequence.prompt) // sequence.span) * sequence.span


def _commit(decoder: Decoder, output: Output, members: list[Sequence]) -> list[Commit]:
    return decoder.commit(members, output.of(members))


def _by_decoder(sequences: Iterable[Sequence]) -> list[tuple[Decoder, list[Sequence]]]:
    """Sequences grouped by their decoder, in order of first appearance."""
    groups: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        groups.setdefault(id(sequence.decoder), []).append(sequence)
    return [(members[0].decoder, members) for members in groups.values()]


def _common_prefix(a: Sequence, b: Sequence) -> int:
    """How many leading prompt tokens two sequences share."""
    width = min(len(a.prompt), len(b.prompt))
    differs = a.prompt_array[:width] != b.prompt_array[:width]
    return int(differs.argmax()) if differs.any() else width
