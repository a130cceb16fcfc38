"""The head's decoder layer in few, large operations.

A pass over a guess or two has little to compute, so every operation that is called shows. Matrices that read the same
input are one here, and queries and keys are rotated together; what comes out is what `eagle.DraftLayer` computes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafters.heads.eagle import Eagle3Head, Rotation


class JoinedLayer:
    """The layer of a head, for positions below `positions`. Weights are copied: later changes of the head's own do
    not count."""

    def __init__(self, head: Eagle3Head, positions: int) -> None:
        layer, config = head.layer, head.config
        attention, mlp = layer.self_attn, layer.mlp
        self._layer = layer
        self._sizes = [config.heads, config.kv_heads]
        self._dim = config.head_dim
        self._norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
        self._qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self._gate_up = _join(mlp.gate_proj, mlp.up_proj)
        self._activation = mlp.activation
        weight = attention.o_proj.weight
        rotation = Rotation(config, positions, weight.device)
        half = self._dim // 2
        self._cos = rotation.cos.to(weight.dtype)
        # Halves change places, and what becomes the lower one its sign.
        self._sin = torch.cat([-rotation.sin[:, :half], rotation.sin[:, half:]], dim=-1).to(weight.dtype)

    def enter(self, embedding: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embedding and hidden state [..., hidden] at `positions` [...] to queries [..., heads, head dim], keys and
        values [..., kv heads, head dim], and the residual."""
        joined, residual = self._layer.enter(embedding, hidden)
        every = F.linear(joined, *self._qkv).unflatten(-1, (-1, self._dim))
        turned, value = every.split([sum(self._sizes), self._sizes[1]], dim=-2)
        if self._norms:
            parts = zip(self._norms, turned.split(self._sizes, dim=-2), strict=True)
            turned = torch.cat([norm(part) for norm, part in parts], dim=-2)
        cos, sin = self._cos[positions].unsqueeze(-2), self._sin[positions].unsqueeze(-2)
        turned = torch.addcmul(turned * cos, turned.roll(self._dim // 2, -1), sin)
        query, key = turned.split(self._sizes, dim=-2)
        return query, key, value, residual

    def leave(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Residual [..., hidden] and attention's result [..., heads, head dim] to the layer's output."""
        layer = self._layer
        hidden: Tensor = residual + layer.self_attn.o_proj(attended.flatten(-2))
        gate, up = F.linear(layer.post_attention_layernorm(hidden), *self._gate_up).chunk(2, dim=-1)
        out: Tensor = hidden + layer.mlp.down_proj(self._activation(gate) * up)
        return out


def _join(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One weight and one bias for layers that read the same input."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return weight, torch.cat(biases) if biases else None
