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
from drafters.heads.eagle import Eagle3Head, Rotation

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
        self.runner = runner
        config = head.config
        self._embeddings = weight.detach() if head.embed_tokens is None else head.embed_tokens.weight
        capacity = runner.cache.capacity + scratch
        shape = LayerShape(config.kv_heads, config.head_dim, config.head_dim, weight.dtype, weight.device)
        self.cache = KVCache([shape], runner.cache.slots, capacity)
        self._rotation = Rotation(config, capacity, weight.device)
        self._captured = tuple(layer - 1 for layer in config.layers)  # whose outputs those inputs are
        runner.keep_features(self._captured)
        self._slots: dict[int, int] = {}
        self._seconds: dict[int, float] = {}

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
        longest = max(end - start for _, start, end in spans)
        tokens = np.zeros((len(spans), longest), dtype=np.int64)
        for i, (sequence, (_, start, end)) in enumerate(zip(sequences, spans, strict=True)):
            tokens[i, : end - start] = sequence.tokens[start + 1 : end + 1]
        counts = np.array([end - start for _, start, end in spans])
        starts = np.array([start for _, start, _ in spans])
        places = starts[:, None] + np.arange(longest)  # [S, Q]
        device = features.device
        slots = [sequence.slot for sequence in sequences]
        if len(spans) == 1:
            seen = features[None, slots[0], starts[0] : starts[0] + longest]
        else:
            at = np.minimum(places, features.shape[1] - 1)
            seen = features[torch.tensor(slots, device=device)[:, None], torch.from_numpy(at).to(device)]
        if self.runner.capture != self._captured:
            seen = seen[:, :, [self.runner.capture.index(layer) for layer in self._captured]]
        hidden = self.head.fuse(seen.to(self._embeddings.dtype))
        visible = np.arange(int((starts + counts).max())) <= places[:, :, None]  # [S, Q, context]
        out = self._layer(spans, tokens, hidden, places, places, visible, counts)
        last = out[torch.arange(len(spans)), torch.from_numpy(counts - 1)][:, None]  # [S, 1, hidden]
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
        spans = [(self._slots[s.id], int(self.cache.lengths[self._slots[s.id]]), 0) for s in sequences]
        base = np.array([start for _, start, _ in spans])
        context = int(base.max()) + (depth + 1) * width
        visible = np.repeat((np.arange(context) < base[:, None])[:, None], width, axis=1)  # [S, K, context]
        row, guess = np.arange(len(spans))[:, None], np.arange(width)[None]
        for level in range(depth):
            visible[row, guess, base[:, None] + level * width + ancestors[:, :, level]] = True
        write = base[:, None] + depth * width + guess
        visible[row, guess, write] = True
        positions = np.broadcast_to(base[:, None] + depth, write.shape)
        counts = np.full(len(spans), width)
        return self._level(self._layer(spans, tokens, hidden, positions, write, visible, counts))

    def _level(self, out: Tensor) -> Level:
        return Level(self.head.feedback(out), self.head.predict(out))

    def _layer(
        self,
        spans: List[tuple[int, int, int]],
        tokens: np.ndarray,
        hidden: Tensor,
        positions: np.ndarray,
        write: np.ndarray,
        visible: np.ndarray,
        counts: np.ndarray,
    ) -> Tensor:
        """The decoder layer over Q queries of each sequence, the first `counts` of which exist: [S, Q, hidden]."""
        device, layer = hidden.device, self.head.layer
        capacity = self.cache.capacity
        joined, residual = layer.enter(F.embedding(_move(tokens, device), self._embeddings), hidden)
        at = _move(np.minimum(positions, capacity - 1), device)
        query = self._rotation(layer.self_attn.query(joined), at)
        key, value = layer.self_attn.key_value(joined)
        key = self._rotation(key, at)
        slots = np.array([slot for slot, _, _ in spans])
        exists = np.arange(tokens.shape[1]) < counts[:, None]
        keys, values = self.cache.keys[0], self.cache.values[0]  # [slots, kv heads, capacity, dim]
        context = visible.shape[2]
        if len(spans) == 1:
            slot, first = int(slots[0]), int(write[0, 0])
            keys[slot, :, first : first + key.shape[1]] = key[0].transpose(0, 1)
            values[slot, :, first : first + value.shape[1]] = value[0].transpose(0, 1)
            near, near_values = keys[slot : slot + 1, :, :context], values[slot : slot + 1, :, :context]
        else:
            where = np.nonzero(exists)
            to, entry = _move(slots[where[0]], device), _move(write[where], device)
            rows, column = _move(where[0], device), _move(where[1], device)
            keys[to, :, entry] = key[rows, column]
            values[to, :, entry] = value[rows, column]
            some = _move(slots, device)
            near, near_values = keys[some, :, :context], values[some, :, :context]
        visible = visible | ~exists[:, :, None]  # padded queries need something to see
        mask = None if visible.all() else _move(visible, device)[:, None]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), near, near_values, attn_mask=mask, enable_gqa=query.shape[2] != key.shape[2]
        )
        return layer.leave(residual, attended.transpose(1, 2))

    def _slot(self, sequence: Sequence) -> int:
        if sequence.id not in self._slots:
            self._slots[sequence.id], _ = self.cache.acquire(_ids(sequence.tokens, 0, len(sequence.tokens) - 1))
        slot = self._slots[sequence.id]
        # The last entry's output is needed, so it is always made again.
        self.cache.truncate(slot, len(sequence.tokens) - 2)
        return slot

    @torch.inference_mode()
    def seconds(self, tokens: int) -> float:
        """What a pass over so many tokens takes, measured once for every power of two."""
        size = max(tokens - 1, 0).bit_length()
        if size not in self._seconds:
            config = self.head.config
            hidden = torch.ones(
                1, 1 << size, config.hidden, dtype=self._embeddings.dtype, device=self._embeddings.device
            )
            kept = hidden.new_ones(1, config.heads, 64, config.head_dim)
            times = []
            for _ in range(_TRIALS):
                began = time.perf_counter()
                joined, residual = self.head.layer.enter(hidden, hidden)
                query = self.head.layer.self_attn.query(joined).transpose(1, 2)
                self.head.layer.self_attn.key_value(joined)
                out = F.scaled_dot_product_attention(query, kept, kept)
                self._level(self.head.layer.leave(residual, out.transpose(1, 2))).logits.argmax(-1).tolist()
                times.append(time.perf_counter() - began)
            self._seconds[size] = min(times)
        return self._seconds[size]

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended; what its slot holds stays for texts that begin alike."""
        if sequence.id in self._slots:
            self.cache.release(self._slots.pop(sequence.id))

    def unlearn(self) -> None:
        """Drop what ended sequences left behind."""
        self.cache.forget()


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
