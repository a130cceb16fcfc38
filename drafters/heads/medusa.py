"""Medusa heads: from one hidden state of the target, the tokens after the next one, each by a head of its own.

Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads". A head is a
residual block, as there; but the output matrix, which there is every head's own, is shared by all and covers the
most frequent tokens only, since at the size of small models it would outweigh everything else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from decoding.errors import ModelError
from drafters.heads.checkpoint import read_config, read_weights


@dataclass(frozen=True)
class MedusaConfig:
    """heads: how many tokens are foreseen. draft_vocab: how many different ones. The rest describes the target:
    hidden size, vocabulary, decoder layers, name."""

    heads: int
    draft_vocab: int
    target_hidden_size: int
    vocab_size: int
    target_num_hidden_layers: int
    target_model: str


class MedusaHeads(nn.Module):
    """All heads. tokens: [draft vocab] the target's ids of the draft vocabulary."""

    tokens: Tensor

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.target_hidden_size
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.heads))
        self.output = nn.Linear(width, config.draft_vocab, bias=False)
        self.register_buffer("tokens", torch.arange(config.draft_vocab))

    def forward(self, hidden: Tensor) -> Tensor:
        """What the target's language-model head receives, [..., hidden], to logits [..., heads, draft vocab]. The
        first head foresees the token after the one that the target itself chooses there."""
        states = torch.stack([hidden + F.silu(block(hidden)) for block in self.blocks], dim=-2)
        logits: Tensor = self.output(states)
        return logits


def write_medusa(heads: MedusaHeads, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"head_type": "medusa", **asdict(heads.config)}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in heads.state_dict().items()
    }
    part = folder / "model.safetensors.part"
    save_file(weights, part)
    part.replace(folder / "model.safetensors")


def read_medusa(folder: str | Path) -> MedusaHeads:
    """What `write_medusa` wrote, in float32. Raises ModelError if it is something else or damaged."""
    folder = Path(folder).expanduser()
    values = read_config(folder)
    if values.pop("head_type", None) != "medusa":
        raise ModelError(f"{folder} holds no Medusa heads.")
    weights = read_weights(folder)
    try:
        heads = MedusaHeads(MedusaConfig(**values))
        heads.load_state_dict(weights)
        if not 0 <= int(heads.tokens.min()) <= int(heads.tokens.max()) < heads.config.vocab_size:
            raise ModelError(f"the Medusa heads in {folder} guess tokens outside their vocabulary; fetch them again.")
    except (TypeError, RuntimeError) as error:
        raise ModelError(f"the Medusa heads in {folder} do not fit their configuration: {error}") from error
    return heads.requires_grad_(False).eval()
