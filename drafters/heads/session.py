"""An EAGLE-3 head at work: its own key/value cache, ragged batches of sequences, trees.

Entry t of a slot belongs to the pair (features at position t, token t + 1). Entries of committed text are made from
the target's true features; those of guesses, from the head's own output, are scratch behind them and forgotten by not
being counted, as in the engine's cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from decoding.engine.cache import KVCache, LayerShape
from decoding.engine.runner import Runner, embeddings
from decoding.engine.sequence import Sequence
from drafters.heads.eagle import Eagle3Head
from drafters.heads.joined import JoinedLayer

_TRIALS = 5  # of a pass whose time is measured


@dataclass(frozen=True)
class Level:
    """What the head said about one position of each of S sequences, or about K guesses of each.

    hidden: [S, K, hidden] what the next level is fed. logits: [S, K, draft vocab].
    """

    hidden: Tensor
    logits: Tensor


class Session:
    """A head attached to a target's runner.

    scratch: entries that one sequence's guesses may take. The runner keeps the features that the head needs from
    now on.
    """

    def __init__(self, head: Eagle3Head, runner: Runner, scratch: int) -> None:
        weight = embeddings(runner.model)
        self.head = head.to(weight.device, weight.dtype).requires_grad_(False).eval()
        self.tokens = self.head.tokens  # [draft vocab] the target's ids
        self.runner = runner
        config = head.config
        self._embeddings = weight.detach() if head.embed_tokens is None else head.embed_tokens.weight
        capacity = runner.cache.capacity + scratch
        shape = LayerShape(config.kv_heads, config.head_dim, config.head_dim, weight.dtype, weight.device)
        self.cache = KVCache([shape], runner.cache.slots, capacity)
        self._layer = JoinedLayer(self.head, capacity)
        self._captured = tuple(layer - 1 for layer in config.layers)  # whose outputs those inputs are
        runner.keep_features(self._captured)
        self._slots: dict[int, int] = {}
        self._seconds: dict[tuple[int, int], float] = {}

    @torch.inference_mode()
    def read(self, sequences: List[Sequence]) -> Level:
        """Take in the committed text that the head has not seen, and say what follows it: K = 1."""
        features = self.runner.features  # [slots, capacity, captured layers, hidden]
        assert features is not None
        spans = []
        for sequence in sequences:
            slot = self._slot(sequence)
            # What the cache holds of guesses that were refused is not counted, so nothing is to be undone.
            spans.append((slot, int(self.cache.lengths[slot]), len(sequence.tokens) - 1))
        slots, starts, ends = np.array(spans).T
        counts = ends - starts
        longest = int(counts.max())
        tokens = np.zeros((len(spans), longest), dtype=np.int64)
        for i, (sequence, (_, start, end)) in enumerate(zip(sequences, spans, strict=True)):
            tokens[i, : end - start] = sequence.tokens[start + 1 : end + 1]
        places = starts[:, None] + np.arange(longest)  # [S, Q]
        device = features.device
        if len(spans) == 1:
            seen = features[None, sequences[0].slot, starts[0] : ends[0]]
        else:
            at = np.minimum(places, features.shape[1] - 1)
            theirs = torch.tensor([sequence.slot for sequence in sequences], device=device)
            seen = features[theirs[:, None], torch.from_numpy(at).to(device)]
        if self.runner.capture != self._captured:
            seen = seen[:, :, [self.runner.capture.index(layer) for layer in self._captured]]
        hidden = self.head.fuse(seen.to(self._embeddings.dtype))
        exists = places < ends[:, None]
        visible = np.arange(int(ends.max())) <= places[:, :, None]  # [S, Q, context]
        out = self._run(slots, tokens, hidden, places, places, visible, exists)
        last = out[:, -1:] if len(spans) == 1 else out[torch.arange(len(spans)), torch.from_numpy(counts - 1)][:, None]
        for sequence, (slot, start, end) in zip(sequences, spans, strict=True):
            self.cache.commit(slot, _ids(sequence.tokens, start, end))
        return self._level(last)

    @torch.inference_mode()
    def guess(
        self, sequences: List[Sequence], tokens: np.ndarray, hidden: Tensor, depth: int, ancestors: np.ndarray
    ) -> Level:
        """Go on behind K guesses of each sequence, all at the same depth (0 for the first).

        tokens: [S, K]. hidden: [S, K, hidden] what the level before put out for their parents. ancestors:
        [S, K, depth] which guess of each level before, by its place there, every guess descends from. K is the same
        at all depths.
        """
        width = tokens.shape[1]
        slots = np.array([self._slots[s.id] for s in sequences])
        base = self.cache.lengths[slots]
        write = base[:, None] + depth * width + np.arange(width)
        positions = np.broadcast_to(base[:, None] + depth, write.shape)
        return self._level(self._run(slots, tokens, hidden, positions, write, _sight(base, ancestors, write), None))

    def _level(self, out: Tensor) -> Level:
        return Level(self.head.feedback(out), self.head.predict(out))

    def _run(
        self,
        slots: np.ndarray,
        tokens: np.ndarray,
        hidden: Tensor,
        positions: np.ndarray,
        write: np.ndarray,
        visible: np.ndarray,
        exists: np.ndarray | None,
    ) -> Tensor:
        """The decoder layer over Q queries of each of S sequences: [S, Q, hidden].

        tokens, positions, write: [S, Q] what is put in, where it stands, and the entry of its slot that it fills.
        visible: [S, Q, context] entries it sees. exists: [S, Q] which of them there are; None for all.
        """
        device = hidden.device
        embedding = F.embedding(_move(tokens, device), self._embeddings)
        at = _move(np.minimum(positions, self.cache.capacity - 1), device)
        query, key, value, residual = self._layer.enter(embedding, hidden, at)
        keys, values = self.cache.keys[0], self.cache.values[0]  # [slots, kv heads, capacity, dim]
        context, first, order = visible.shape[2], int(slots[0]), None
        if len(slots) == 1:
            here = slice(int(write[0, 0]), int(write[0, -1]) + 1)
            keys[first, :, here] = key[0].transpose(0, 1)
            values[first, :, here] = value[0].transpose(0, 1)
            near, near_values = keys[first : first + 1, :, :context], values[first : first + 1, :, :context]
        else:
            row, column = np.nonzero(np.ones(write.shape, dtype=bool) if exists is None else exists)
            to, entry = _move(slots[row], device), _move(write[row, column], device)
            rows, columns = _move(row, device), _move(column, device)
            keys[to, :, entry] = key[rows, columns]
            values[to, :, entry] = value[rows, columns]
            first = int(slots.min())
            if int(slots.max()) - first + 1 == len(slots) == len(set(slots.tolist())):
                # The slots of a whole range are read where they are, so the queries take their order.
                order = np.argsort(slots)
                query, visible = query[_move(order, device)], visible[order]
                exists = None if exists is None else exists[order]
                last = first + len(slots)
                near, near_values = keys[first:last, :, :context], values[first:last, :, :context]
            else:
                some = _move(slots, device)
                near, near_values = keys[some, :, :context], values[some, :, :context]
        if exists is not None:
            visible = visible | ~exists[:, :, None]  # padded queries need something to see
        mask = None if visible.all() else _move(visible, device)[:, None]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), near, near_values, attn_mask=mask, enable_gqa=query.shape[2] != key.shape[2]
        ).transpose(1, 2)
        if order is not None:
            attended = attended[_move(np.argsort(order), device)]
        return self._layer.leave(residual, attended)

    def _slot(self, sequence: Sequence) -> int:
        if sequence.id not in self._slots:
            self._slots[sequence.id], _ = self.cache.acquire(_ids(sequence.tokens, 0, len(sequence.tokens) - 1))
        slot = self._slots[sequence.id]
        # The last entry's output is needed, so it is always made again.
        self.cache.truncate(slot, len(sequence.tokens) - 2)
        return slot

    @torch.inference_mode()
    def seconds(self, sequences: int, guesses: int) -> float:
        """What a level of so many guesses for each of so many sequences takes, measured once for every power of two of
        sequences. What it writes to the cache lies behind what counts."""
        rows = 1 << max(sequences - 1, 0).bit_length()
        if (rows, guesses) not in self._seconds:
            slots = np.arange(rows) % self.cache.slots
            tokens = np.zeros((rows, guesses), dtype=np.int64)
            base = np.minimum(self.cache.lengths[slots], self.cache.capacity - guesses)
            write = base[:, None] + np.arange(guesses)
            visible = _sight(base, np.zeros((rows, guesses, 0), dtype=np.int64), write)
            hidden = self._embeddings.new_ones(rows, guesses, self.head.config.hidden)
            times = []
            for _ in range(_TRIALS):
                began = time.perf_counter()
                level = self._level(self._run(slots, tokens, hidden, write, write, visible, None))
                level.logits.max(-1).values.sub(level.logits.logsumexp(-1)).tolist()
                times.append(time.perf_counter() - began)
            self._seconds[rows, guesses] = min(times)
        return self._seconds[rows, guesses]

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended; what its slot holds stays for texts that begin alike."""
        if sequence.id in self._slots:
            self.cache.release(self._slots.pop(sequence.id))

    def unlearn(self) -> None:
        """Drop what ended sequences left behind."""
        self.cache.forget()


def _sight(base: np.ndarray, ancestors: np.ndarray, write: np.ndarray) -> np.ndarray:
    """[S, K, context] what guesses see: `base` [S] entries of text, those of their ancestors [S, K, depth], by their
    places in each level, and their own, `write` [S, K]."""
    count, width, depth = ancestors.shape
    context = int(write.max()) + 1
    visible = np.repeat((np.arange(context) < base[:, None])[:, None], width, axis=1)
    row, guess = np.arange(count)[:, None], np.arange(width)[None]
    for level in range(depth):
        visible[row, guess, base[:, None] + level * width + ancestors[:, :, level]] = True
    visible[row, guess, write] = True
    return visible


def _ids(tokens: List[int], start: int, end: int) -> list[int]:
    """What entries start … end - 1 were made from, as ids that differ if anything before them does.

    An entry is known by its own token, the first one by the text's first two.
    """
    ids = list(tokens[start + 1 : end + 1])
    if start == 0 and ids:
        ids[0] += (tokens[0] + 1) << 32
    return ids


def _move(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
