"""Attention over packed blocks and slotted caches, plugged into transformers' attention interface.

During a step, the model's attention layers call `packed_attention` in place of their own kernel. It writes
the new keys and values into the cache and attends with the step's masks. Outside a step the model is
untouched, so `model.generate` keeps working.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from decoding.engine.cache import KVCache, LayerShape

NAME = "packed_blocks"
_active = threading.local()


@dataclass
class Group:
    """Sequences that attend together: a range of neighbouring slots, padded to one shape.

    Slots in the range without a sequence are computed too and thrown away: reading keys where they lie
    is cheaper than gathering them.

    first, last: the range of slots. start, stop: the group's tokens in the packed row.
    context: keys to read per slot.
    gather: [slots, width] packed index (from `start`) of every padded query; None if the group's tokens
        are already laid out as [slots, width].
    scatter: [tokens] index into the padded queries of every token; None likewise.
    visible: [slots, width, context] whether a query sees a key.
    key_positions: [slots, context], query_positions: [slots, width] as the model's positions.
    """

    first: int
    last: int
    start: int
    stop: int
    context: int
    width: int
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    visible: np.ndarray
    key_positions: np.ndarray
    query_positions: np.ndarray
    _masks: dict[tuple[int | None, int, torch.dtype, torch.device], torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, fold: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """[slots, 1, fold × width, context] additive mask; None where everything is visible."""
        key = (window, fold, dtype, device)
        if key not in self._masks:
            visible = self.visible
            if window is not None and self.context > window:
                near = self.key_positions[:, None, :] > self.query_positions[:, :, None] - window
                visible = visible & near
            if visible.all():
                self._masks[key] = None
            else:
                mask = torch.zeros(visible.shape, dtype=dtype)
                mask.masked_fill_(torch.from_numpy(~visible), float("-inf"))
                self._masks[key] = mask.to(device, non_blocking=True).repeat(1, fold, 1).unsqueeze(1)
        return self._masks[key]


@dataclass
class AttentionStep:
    """Everything the attention layers need to know about the current step.

    write: [tokens] entry of the cache, as slot × capacity + offset, that each packed token fills.
    contiguous: (slot, offset) if there is one sequence, whose entries are a plain slice.
    """

    cache: KVCache
    groups: list[Group]
    write: torch.Tensor
    contiguous: tuple[int, int] | None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [1, heads, tokens, key_dim]
        key: torch.Tensor,  # [1, kv_heads, tokens, key_dim]
        value: torch.Tensor,  # [1, kv_heads, tokens, value_dim]
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # [1, tokens, heads, value_dim]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        self._store(keys, key)
        self._store(values, value)
        heads, kv_heads = query.shape[1], key.shape[1]
        fold = heads // kv_heads
        outputs = []
        for group in self.groups:
            slots = group.last - group.first
            q = query[0, :, group.start : group.stop]  # [heads, tokens, dim]
            if group.gather is not None:
                q = q.index_select(1, group.gather)
            q = q.view(heads, slots, group.width, -1).transpose(0, 1)
            k = keys[group.first : group.last, :, : group.context]
            v = values[group.first : group.last, :, : group.context]
            if softcap is None and sinks is None and slots == 1:
                mask = group.mask(window, 1, query.dtype, query.device)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=fold > 1)
            else:
                # Queries that share a key head are stacked, so that every key is read once.
                q = q.reshape(slots, kv_heads, fold * group.width, -1)
                mask = group.mask(window, fold, query.dtype, query.device)
                out = _attend_stacked(q, k, v, mask, scale, softcap, sinks, fold)
            out = out.view(slots, heads, group.width, -1).permute(0, 2, 1, 3).reshape(slots * group.width, heads, -1)
            outputs.append(out if group.scatter is None else out.index_select(0, group.scatter))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)

    def _store(self, cache: torch.Tensor, new: torch.Tensor) -> None:
        if self.contiguous is not None:
            slot, offset = self.contiguous
            cache[slot, :, offset : offset + new.shape[2]] = new[0]
        else:
            entries = self.write.to(cache.device, non_blocking=True)
            capacity = cache.shape[2]
            cache[entries // capacity, :, entries % capacity] = new[0].transpose(0, 1)


def _attend_stacked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    fold: int,
) -> torch.Tensor:
    """Attention of queries [slots, kv_heads, fold × width, dim]; spelled out for models that squash scores (Gemma 2)
    or add a sink per head (gpt-oss)."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        return torch.softmax(scores, dim=-1) @ v
    slots, kv_heads, queries, _ = scores.shape
    per_query = sinks.view(kv_heads, fold, 1).expand(kv_heads, fold, queries // fold).reshape(1, kv_heads, queries, 1)
    scores = torch.cat([scores, per_query.expand(slots, -1, -1, -1).to(scores.dtype)], dim=-1)
    return torch.softmax(scores, dim=-1)[..., :-1] @ v


@dataclass
class ShapeProbe:
    """A stand-in for a step that learns what each layer caches, attending causally on the way."""

    layers: dict[int, LayerShape] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        self.layers[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: shapes as in its attention interface, one row of packed tokens."""
    if torch.compiler.is_compiling():
        return _attend(query, key, value, scaling, sliding_window, softcap, s_aux), None
    step: AttentionStep | ShapeProbe = _active.step
    layer: int = module.layer_idx  # type: ignore[assignment]
    return step.attend(layer, query, key, value, scaling, sliding_window, softcap, s_aux), None


AttentionInterface.register(NAME, packed_attention)


@torch.library.custom_op("parallel_decoding::attend", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`AttentionStep.attend` as one operation of compiled code, which the step's cache and masks are no part of."""
    step: AttentionStep = _active.step
    return step.attend(_active.layer, query, key, value, scale, window, softcap, sinks).contiguous()


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def enter_layer(index: int) -> None:
    """Say which layer compiled code is about to compute; being the same for many, it cannot know."""
    _active.layer = index


@contextmanager
def attending(configs: list[Any], step: AttentionStep | ShapeProbe) -> Iterator[None]:
    """Route the attention of models with these configurations through `step`."""
    before = [config._attn_implementation for config in configs]
    _active.step = step
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        _active.step = None
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
