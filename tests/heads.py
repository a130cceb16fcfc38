"""Random EAGLE-3 heads for tiny models, and drafting with them spelled out token by token."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from drafters.heads.eagle import Eagle3Head, HeadConfig, Rotation

SMALL: dict[str, Any] = {"vocab_size": 12, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Options of a tiny model with so few tokens that a random head is right now and then."""


def random_head(model: PreTrainedModel, draft_vocab: int = 9, seed: int = 0, **flags: Any) -> Eagle3Head:
    """A head that fits a tiny model, with a draft vocabulary of some tokens in the middle of it."""
    text = model.config.get_text_config()
    vocab = len(model.get_output_embeddings().weight)
    layer = LlamaConfig(
        vocab_size=vocab,
        hidden_size=text.hidden_size,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        bos_token_id=None,
        eos_token_id=None,
    )
    config = HeadConfig(
        layer,
        draft_vocab=draft_vocab,
        target_hidden=text.hidden_size,
        layers=(1, 2),
        target_layers=text.num_hidden_layers,
        target_model="tiny",
        **flags,
    )
    generator = torch.Generator().manual_seed(seed)
    head = Eagle3Head(config)
    for name, parameter in head.named_parameters():
        spread = 0.1 if parameter.dim() == 1 else 0.25
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread + ("norm" in name)
    # halves survive a round trip through a checkpoint in half precision
    head.half().float()
    if draft_vocab < vocab:
        tokens = torch.randperm(vocab, generator=generator)[:draft_vocab].sort().values
        head.use_tokens(tokens)
    return head.requires_grad_(False).eval()


@torch.no_grad()
def slow_draft(
    head: Eagle3Head, embeddings: torch.Tensor, tokens: List[int], features: torch.Tensor, path: List[int]
) -> torch.Tensor:
    """[1 + len(path), draft vocab] logits behind a text of n tokens and behind each guess of `path` below it.

    features: [n - 1, layers, hidden] at least, of the text's tokens but the last.
    """
    rotate, layer = Rotation(head.config, 128, torch.device("cpu")), head.layer
    fold = head.config.heads // head.config.kv_heads
    fused = head.fuse(features)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    found = []
    out = fused[0]  # replaced before it is fed back
    for place, token in enumerate([*tokens[1:], *path]):
        hidden = fused[place] if place < len(tokens) - 1 else head.feedback(out)
        joined, residual = layer.enter(embeddings[token], hidden)
        key, value = layer.self_attn.key_value(joined)
        keys.append(rotate(key, torch.tensor(place)))
        values.append(value)
        query = rotate(layer.self_attn.query(joined), torch.tensor(place))
        k = torch.stack(keys).repeat_interleave(fold, dim=1)  # [places, heads, dim]
        v = torch.stack(values).repeat_interleave(fold, dim=1)
        weights = (torch.einsum("hd,phd->hp", query, k) * head.config.head_dim**-0.5).softmax(-1)
        out = layer.leave(residual, torch.einsum("hp,phd->hd", weights, v))
        if place >= len(tokens) - 2:
            found.append(head.predict(out))
    return torch.stack(found)
