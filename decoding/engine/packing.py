"""Laying the blocks of many sequences side by side in one row, with nothing padded but attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from decoding.engine.attention import AttentionStep, Group
from decoding.engine.block import Block, Layout, layout
from decoding.engine.cache import KVCache

# A separate attention call costs about as much as reading this many more keys of one slot.
_CALL_COST = 512
# Blocks longer than this attend alone: padding others to their width would cost more than a call.
_LONG = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step.

    slot: where its keys and values live. pending: committed tokens that the cache does not hold yet.
    block: guesses behind them. logits: whether to compute logits, at the last pending token and at
    every guess. span: how far attention looks ahead, see `Decoder.span`.
    """

    slot: int
    pending: Sequence[int]
    block: Block
    logits: bool = True
    span: int = 1

    def __len__(self) -> int:
        return len(self.pending) + len(self.block)


@dataclass(frozen=True)
class PackedStep:
    """A step ready to run: tokens and positions [1, tokens], which rows need logits, and attention.

    keep: packed index of every position that needs logits, sequence after sequence in the order of the rows.
    order: [tokens] packed index of every token, likewise in the order of the rows.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    keep: torch.Tensor
    order: torch.Tensor
    attention: AttentionStep


@dataclass(frozen=True)
class Places:
    """Where the tokens of a step lie and what they see, token after token in the order of the rows; all int32.

    slot, place: [tokens] entry of the cache that a token fills. position: [tokens] the model's position.
    prefix: [tokens] a token sees so many leading entries of its slot, itself often the last of them, and
    more[first[t]:first[t + 1]] as well.
    """

    slot: np.ndarray
    place: np.ndarray
    position: np.ndarray
    prefix: np.ndarray
    first: np.ndarray
    more: np.ndarray

    def entries(self, capacity: int) -> torch.Tensor:
        """[tokens] slot × capacity + place."""
        return torch.from_numpy(self.slot.astype(np.int64) * capacity + self.place)


def flatten(rows: Sequence[Row], cache: KVCache) -> tuple[np.ndarray, Places, np.ndarray]:
    """Token ids [tokens] of a step, where they lie, and which of them need logits, in the order of the rows."""
    tokens: list[int] = []
    keep, place, position, prefix, counts, more = [], [], [], [], [], []
    for row in rows:
        base, start = int(cache.lengths[row.slot]), len(tokens)
        tokens += row.pending
        tokens += row.block.tokens
        sight = _sight(
            len(row.block),
            len(row.pending),
            None if row.block.parents is None else tuple(row.block.parents),
            row.block.bidirectional,
            row.span,
            base % row.span if row.span > 1 else 0,
            row.block.suffix,
        )
        if row.logits:
            keep.append(np.arange(start + len(row.pending) - 1, len(tokens)))
        place.append(base + sight.index)
        position.append(base + sight.depth)
        prefix.append(base + sight.lead)
        counts.append(sight.counts)
        more.append(base + sight.more)
    slots = np.array([row.slot for row in rows], dtype=np.int32)
    places = Places(
        slot=np.repeat(slots, [len(row) for row in rows]),
        place=_joined(place),
        position=_joined(position),
        prefix=_joined(prefix),
        first=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32),
        more=_joined(more),
    )
    return np.asarray(tokens, dtype=np.int64), places, _joined(keep) if keep else np.zeros(0, dtype=np.int32)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int32)


@dataclass(frozen=True, slots=True)
class _Sight:
    """What the tokens of one row see, counted from its first: the first `lead`, and `counts` of the entries `more`."""

    index: np.ndarray
    depth: np.ndarray
    lead: np.ndarray
    counts: np.ndarray
    more: np.ndarray


@lru_cache(maxsize=4096)
def _sight(
    count: int,
    pending: int,
    parents: tuple[int, ...] | None,
    bidirectional: bool,
    span: int,
    base: int,
    suffix: int,
) -> _Sight:
    each = layout(count, pending, parents, bidirectional, span, base)
    index = np.arange(pending + count)
    if each.visible is None and not suffix:
        return _Sight(index, each.depth, index + 1, np.zeros_like(index), np.zeros(0, dtype=np.int64))
    visible = np.tri(len(index), dtype=bool) if each.visible is None else each.visible
    visible = np.hstack([visible, visible[:, -1:].repeat(suffix, axis=1)])
    lead = np.where(visible.all(axis=1), visible.shape[1], visible.argmin(axis=1))
    token, entry = np.nonzero(visible & (np.arange(visible.shape[1]) >= lead[:, None]))
    return _Sight(index, each.depth, lead, np.bincount(token, minlength=len(index)), entry)


def pack(rows: Sequence[Row], cache: KVCache, device: torch.device) -> PackedStep:
    """Pack the rows of one step. Sequences end up in the order of their slots; `keep` undoes that."""
    cached = cache.lengths
    layouts = [
        layout(
            len(row.block),
            len(row.pending),
            None if row.block.parents is None else tuple(row.block.parents),
            row.block.bidirectional,
            row.span,
            int(cached[row.slot]) % row.span if row.span > 1 else 0,
        )
        for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]) > _LONG, rows[i].slot))
    tokens: list[int] = []
    starts = [0] * len(rows)
    for i in order:
        starts[i] = len(tokens)
        tokens += rows[i].pending
        tokens += rows[i].block.tokens
    positions = np.concatenate([cached[rows[i].slot] + layouts[i].depth for i in order])
    write = np.concatenate(
        [rows[i].slot * cache.capacity + cached[rows[i].slot] + np.arange(len(rows[i])) for i in order]
    )
    keep = [
        np.arange(starts[i] + len(row.pending) - 1, starts[i] + len(row)) for i, row in enumerate(rows) if row.logits
    ]
    groups = [
        _group([rows[i] for i in members], [layouts[i] for i in members], starts[members[0]], cache, device)
        for members in _partition(rows, order, cached)
    ]

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    only = rows[0] if len(rows) == 1 else None
    return PackedStep(
        tokens=move(np.asarray(tokens, dtype=np.int64))[None],
        positions=move(positions.astype(np.int64))[None],
        keep=move(np.concatenate(keep) if keep else np.zeros(0, dtype=np.int64)),
        order=move(np.concatenate([starts[i] + np.arange(len(row)) for i, row in enumerate(rows)])),
        attention=AttentionStep(
            cache, groups, move(write), None if only is None else (only.slot, int(cached[only.slot]))
        ),
    )


def _partition(rows: Sequence[Row], order: Sequence[int], cached: np.ndarray) -> list[list[int]]:
    """Split the short blocks, in the order of their slots, into groups of least cost; long ones stay alone.

    A group reads its longest context for every slot in its range, so joining sequences saves calls and
    wastes reads. Dynamic programming over where the last group starts.
    """
    short = [i for i in order if len(rows[i]) <= _LONG]
    context = [int(cached[rows[i].slot]) + len(rows[i]) + rows[i].block.suffix for i in short]
    best = [0] + [0] * len(short)
    cut = [0] * (len(short) + 1)
    for end in range(1, len(short) + 1):
        longest, least = 0, None
        for start in range(end - 1, -1, -1):
            longest = max(longest, context[start])
            span = rows[short[end - 1]].slot - rows[short[start]].slot + 1
            cost = best[start] + span * longest + _CALL_COST
            if least is None or cost < least:
                least, cut[end] = cost, start
        assert least is not None
        best[end] = least
    groups: list[list[int]] = []
    end = len(short)
    while end:
        groups.append(short[cut[end] : end])
        end = cut[end]
    return groups[::-1] + [[i] for i in order if len(rows[i]) > _LONG]


def _group(rows: Sequence[Row], layouts: Sequence[Layout], start: int, cache: KVCache, device: torch.device) -> Group:
    lengths = np.array([len(row) for row in rows])
    slots = np.array([row.slot for row in rows])
    first, last = int(slots[0]), int(slots[-1]) + 1
    width = int(lengths.max())
    cached = np.zeros(last - first, dtype=np.int64)  # slots without a sequence see their first entry only
    cached[slots - first] = cache.lengths[slots]
    context = int((cache.lengths[slots] + lengths + [row.block.suffix for row in rows]).max())
    keys = np.arange(context)
    query_positions = cached[:, None] + np.arange(width)
    if all(each.visible is None for each in layouts):
        visible = keys <= query_positions[:, :, None]
        key_positions = np.broadcast_to(keys, (last - first, context))
    else:
        visible = np.repeat((keys < cached[:, None])[:, None], width, axis=1)
        visible[:, :, 0] = True  # padded queries need something to see
        key_positions = np.repeat(keys[None], last - first, axis=0)
        for row, each in zip(rows, layouts, strict=True):
            at, base, count = row.slot - first, int(cache.lengths[row.slot]), len(row)
            inside = np.tril(np.ones((count, count), dtype=bool)) if each.visible is None else each.visible
            if base == 0:
                visible[at, :count, 0] = False
            visible[at, :count, base : base + count] = inside
            visible[at, :count, base + count : base + count + row.block.suffix] = inside[:, -1:]
            key_positions[at, base : base + count] = base + each.depth
            query_positions[at, :count] = base + each.depth
    gather = scatter = None
    if len(rows) != last - first or (lengths != width).any():
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        padded = np.zeros((last - first, width), dtype=np.int64)
        places = []
        for row, offset, count in zip(rows, offsets, lengths, strict=True):
            at = row.slot - first
            padded[at, :count] = offset + np.arange(count)
            places.append(at * width + np.arange(count))
        gather = torch.from_numpy(padded.ravel()).to(device, non_blocking=True)
        scatter = torch.from_numpy(np.concatenate(places)).to(device, non_blocking=True)
    return Group(
        first=first,
        last=last,
        start=start,
        stop=start + int(lengths.sum()),
        context=context,
        width=width,
        gather=gather,
        scatter=scatter,
        visible=visible,
        key_positions=key_positions,
        query_positions=query_positions,
    )
