"""The EAGLE-3 head: one decoder layer over [embedding ; fused features of the target], with a vocabulary of its own.

Li et al. 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test". Parameter
names are those of the `speculators` library, so a state dict needs no translation. Drafting and training share this
module; each brings its own attention, since one has a cache and the other unrolls several steps at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


@dataclass(frozen=True)
class HeadConfig:
    """What an EAGLE-3 head is made of.

    layer: sizes of the decoder layer, its rotary embedding, and `vocab_size`, the target's vocabulary.
    draft_vocab: tokens that the head can propose. target_hidden: width of the target's residual stream.
    layers: the target's decoder layers whose *input* the head sees (k means the residual stream after layer
    k - 1, `hidden_states[k]` in transformers). target_layers: how many the target has, None if unknown.
    norm_before_residual: the layer's residual is the normalized feature. norm_before_fc, fc_norm: features are
    normalized before they are fused, all at once or layer by layer. norm_output: what is fed back is normalized.
    own_embeddings: the head has embeddings of its own instead of the target's. target_model: the target's name.
    """

    layer: LlamaConfig | Qwen3Config
    draft_vocab: int
    target_hidden: int
    layers: tuple[int, ...]
    target_layers: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    own_embeddings: bool = False
    target_model: str = ""

    @property
    def vocab(self) -> int:
        """The target's vocabulary."""
        return int(self.layer.vocab_size)

    @property
    def hidden(self) -> int:
        """Width of the head."""
        return int(self.layer.hidden_size)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.layer.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return int(self.layer.num_key_value_heads or self.heads)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return int(getattr(self.layer, "head_dim", None) or self.hidden // self.heads)


def default_layers(count: int) -> tuple[int, ...]:
    """The layers whose inputs EAGLE-3 looks at, of `count`: a low, a middle and a high one."""
    return tuple(sorted({min(2, count), max(count // 2, 1), max(count - 3, 1)}))


class Eagle3Head(nn.Module):
    """The head itself. `d2t` and `t2d` map between its vocabulary and the target's.

    d2t: [draft vocab] the target's id of draft token i is i + d2t[i]. t2d: [vocab] which tokens the head knows.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden, config.layer.rms_norm_eps
        fused = len(config.layers) * config.target_hidden
        self.fc = nn.Linear(fused, width, bias=False)
        self.input_norm = nn.RMSNorm(fused, eps=eps) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(nn.RMSNorm(config.target_hidden, eps=eps) for _ in config.layers) if config.fc_norm else None
        )
        self.layers = nn.ModuleList([DraftLayer(config)])
        self.norm = nn.RMSNorm(width, eps=eps)
        self.lm_head = nn.Linear(width, config.draft_vocab, bias=False)
        self.embed_tokens = nn.Embedding(config.vocab, width) if config.own_embeddings else None
        self.register_buffer("d2t", torch.zeros(config.draft_vocab, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.vocab, dtype=torch.bool))
        self.use_tokens(torch.arange(config.draft_vocab))

    @property
    def layer(self) -> DraftLayer:
        """Its one decoder layer."""
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    @property
    def tokens(self) -> Tensor:
        """[draft vocab] the target's id of every draft token."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def use_tokens(self, tokens: Tensor) -> None:
        """Let the draft vocabulary be these ids of the target, sorted: [draft vocab]."""
        self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
        self.t2d.zero_()[tokens] = True

    def fuse(self, features: Tensor) -> Tensor:
        """Features [..., layers, target hidden] to the head's input [..., hidden]."""
        if self.fc_norm is not None:
            parts = [norm(part) for norm, part in zip(self.fc_norm, features.unbind(-2), strict=True)]
            flat = torch.cat(parts, dim=-1)
        else:
            flat = features.flatten(-2)
        if self.input_norm is not None:
            flat = self.input_norm(flat)
        fused: Tensor = self.fc(flat)
        return fused

    def predict(self, out: Tensor) -> Tensor:
        """The layer's output [..., hidden] to logits over the draft vocabulary [..., draft vocab]."""
        logits: Tensor = self.lm_head(self.norm(out))
        return logits

    def feedback(self, out: Tensor) -> Tensor:
        """The layer's output as the next draft step takes it in place of features."""
        fed: Tensor = self.norm(out) if self.config.norm_output else out
        return fed


class DraftLayer(nn.Module):
    """A decoder layer whose attention reads the embedding beside the hidden state; only the latter is a residual."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, eps = config.hidden, config.layer.rms_norm_eps
        self._residual_is_normal = config.norm_before_residual
        self.self_attn = _Projections(config)
        self.mlp = _Mlp(config)
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.hidden_norm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)

    def enter(self, embedding: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding and hidden state [..., hidden] to what attention reads [..., 2 · hidden] and the residual."""
        normal = self.hidden_norm(hidden)
        joined = torch.cat([self.input_layernorm(embedding), normal], dim=-1)
        return joined, normal if self._residual_is_normal else hidden

    def leave(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Residual [..., hidden] and attention's result [..., heads, head dim] to the layer's output."""
        hidden = residual + self.self_attn.o_proj(attended.flatten(-2))
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class _Mlp(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, inner = config.hidden, int(config.layer.intermediate_size)
        bias = bool(getattr(config.layer, "mlp_bias", False))
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.activation = ACT2FN[config.layer.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Projections(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, dim = config.hidden, config.head_dim
        bias = bool(getattr(config.layer, "attention_bias", False))
        self.q_proj = nn.Linear(2 * width, config.heads * dim, bias=bias)
        self.k_proj = nn.Linear(2 * width, config.kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(2 * width, config.kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(config.heads * dim, width, bias=bias)
        per_head = isinstance(config.layer, Qwen3Config)
        self.q_norm = nn.RMSNorm(dim, eps=config.layer.rms_norm_eps) if per_head else None
        self.k_norm = nn.RMSNorm(dim, eps=config.layer.rms_norm_eps) if per_head else None
        self._dim = dim

    def query(self, joined: Tensor) -> Tensor:
        """[..., 2 · hidden] to [..., heads, head dim], positions not yet applied."""
        query: Tensor = self.q_proj(joined).unflatten(-1, (-1, self._dim))
        return query if self.q_norm is None else self.q_norm(query)

    def key_value(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 2 · hidden] to keys and values [..., kv heads, head dim], positions not yet applied."""
        key: Tensor = self.k_proj(joined).unflatten(-1, (-1, self._dim))
        value: Tensor = self.v_proj(joined).unflatten(-1, (-1, self._dim))
        return (key if self.k_norm is None else self.k_norm(key)), value


class Rotation:
    """Rotary position embedding. cos, sin: [positions, head dim]."""

    def __init__(self, config: HeadConfig, positions: int, device: torch.device) -> None:
        rotary = LlamaRotaryEmbedding(config.layer).to(device)  # type: ignore[arg-type]
        cos, sin = rotary(torch.zeros(1, device=device), torch.arange(positions, device=device)[None])
        self.cos, self.sin = cos[0], sin[0]

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate [..., heads, head dim] by positions [...]."""
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin
