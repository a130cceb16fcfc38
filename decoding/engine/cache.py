"""Key/value cache: fixed slots, one per sequence, with rollback, fork and prefix reuse.

A slot's length counts committed tokens only. What a block wrote beyond it is scratch, and forgotten by not
counting it; so rollback costs nothing, and works for sliding windows too, because a window is a mask here
and never a ring buffer. Released slots keep their contents: a later prompt that starts the same way reuses
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

LINE = 64
"""Bytes of a CPU's cache line. A vector that lies across two takes two reads."""


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores per token: [heads, head_dim] keys and values."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class KVCache:
    """Keys and values of `slots` sequences of up to `capacity` tokens, allocated once.

    keys[i], values[i]: layer i, [slots, heads, capacity, head_dim].
    tokens: [slots, capacity] the ids that each slot's entries were computed from.
    lengths: [slots] how many of them are committed.
    spans: [slots] how far attention looked ahead when they were computed, see `Decoder.span`.
    """

    def __init__(self, layers: Sequence[LayerShape], slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.tokens = np.zeros((slots, capacity), dtype=np.int64)
        self.lengths = np.zeros(slots, dtype=np.int64)
        self.spans = np.ones(slots, dtype=np.int64)
        self._free = set(range(slots))
        # Layers of one shape share one tensor, so that copying tokens between slots is one operation.
        self._stacks: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.keys: list[torch.Tensor] = [torch.empty(0)] * len(layers)
        self.values: list[torch.Tensor] = [torch.empty(0)] * len(layers)
        for shape in dict.fromkeys(layers):
            members = [i for i, layer in enumerate(layers) if layer == shape]

            keys, values = (
                _zeros((len(members), slots, shape.heads, capacity, dim), shape)
                for dim in (shape.key_dim, shape.value_dim)
            )
            self._stacks.append((keys, values))
            for row, i in enumerate(members):
                self.keys[i], self.values[i] = keys[row], values[row]

    def keep(self, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[slots, capacity, width] zeros for something else that is known per token. From now on it follows the keys
        and values wherever entries are copied, moved or wiped. What was cached before serves nobody as a prefix."""
        kept = _zeros((1, self.slots, 1, self.capacity, width), LayerShape(1, width, 0, dtype, device))
        self._stacks.append((kept, kept[..., :0]))
        self.forget()
        self.tokens[:] = -1  # of slots in use: no prompt begins like this
        return kept[0, :, 0]

    @property
    def free(self) -> int:
        """How many slots no sequence holds."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.nbytes for stack in self._stacks for t in stack)

    def shared_prefix(self, tokens: np.ndarray) -> np.ndarray:
        """[slots] how many leading tokens each slot has in common with `tokens`, committed ones only."""
        width = min(len(tokens), int(self.lengths.max(initial=0)))
        same = self.tokens[:, :width] == tokens[:width]
        run = np.where(same.all(axis=1), width, same.argmin(axis=1)) if width else np.zeros(self.slots, np.int64)
        return np.minimum(run, self.lengths)

    def acquire(self, prompt: Sequence[int], span: int = 1) -> tuple[int, int]:
        """Take a free slot for `prompt` and fill it with the longest prefix any slot has of it.

        Returns (slot, reused tokens). At least the prompt's last token is left to compute, since its
        logits are needed. span: entries computed with another one do not serve; those of a stretch of which not all
        tokens are the same do not either. Contents of other slots do not change. Needs a free slot.
        """
        tokens = np.asarray(prompt, dtype=np.int64)
        common = np.where(self.spans == span, self.shared_prefix(tokens), 0)
        common = np.minimum(common // span * span if span else 0 * common, len(tokens) - 1)
        source = int(common.argmax())
        reused = int(common[source])
        if reused and source in self._free and 2 * reused >= self.lengths[source]:
            slot = source
        else:  # what the source holds beyond the prefix is worth keeping, too
            # The slot whose contents are worth least: the shortest, then the lowest, so that active
            # slots stay close together.
            slot = min(self._free, key=lambda s: (self.lengths[s] > 0, common[s], s))
            if reused and slot != source:
                self._copy(source, slot, reused)
        self._free.remove(slot)
        self.lengths[slot] = reused
        self.spans[slot] = span
        self.tokens[slot, :reused] = tokens[:reused]
        return slot, reused

    def _copy(self, source: int, target: int, length: int) -> None:
        for keys, values in self._stacks:
            keys[:, target, :, :length] = keys[:, source, :, :length]
            values[:, target, :, :length] = values[:, source, :, :length]

    def release(self, slot: int) -> None:
        """Give a slot back. Its contents stay, for prompts that begin alike, until it is taken again."""
        self._free.add(slot)

    def forget(self) -> None:
        """Drop what free slots still hold, so that nothing of it is reused."""
        self.lengths[sorted(self._free)] = 0

    def discard(self, slot: int) -> None:
        """Give a slot back and wipe it (after a failure, so that no NaN survives)."""
        for keys, values in self._stacks:
            keys[:, slot] = 0
            values[:, slot] = 0
        self.lengths[slot] = 0
        self._free.add(slot)

    def commit(self, slot: int, tokens: Sequence[int]) -> None:
        """Count `tokens`, whose entries the last forward pass wrote behind the committed ones."""
        start = self.lengths[slot]
        self.tokens[slot, start : start + len(tokens)] = tokens
        self.lengths[slot] = start + len(tokens)

    def truncate(self, slot: int, length: int) -> None:
        """Roll a slot back to its first `length` tokens."""
        self.lengths[slot] = min(self.lengths[slot], length)

    def move(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Copy entries within slots, each given as (slot, from, to). All reads happen before all writes.

        Compacts the accepted path of a tree.
        """
        if not entries:
            return
        slot, source, target = np.array(entries, dtype=np.int64).T
        for keys, values in self._stacks:
            row, src, dst = (torch.from_numpy(a.copy()).to(keys.device) for a in (slot, source, target))
            keys[:, row, :, dst] = keys[:, row, :, src]
            values[:, row, :, dst] = values[:, row, :, src]


def _zeros(size: tuple[int, ...], shape: LayerShape) -> torch.Tensor:
    """Zeros, since masked-out garbage must stay finite: 0 × NaN is NaN.

    On a CPU they come from NumPy, whose zeros take no memory until they are written to, and begin with a cache line.
    """
    if shape.device.type != "cpu":
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)
    count = math.prod(size) * shape.dtype.itemsize
    lazy = np.zeros(count + LINE, dtype=np.uint8)
    begin = -lazy.ctypes.data % LINE
    return torch.from_numpy(lazy[begin : begin + count]).view(shape.dtype).view(size)
