"""Weights in fewer bits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

WEIGHTS = ("float32", "int8")
"""Names of what the weights of linear layers can be held in during a step."""


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] as 8-bit integers, and the factor [rows] that each row was divided by."""
    factor = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / factor[:, None]).round().clamp(-127, 127).to(torch.int8), factor


@torch.no_grad()
def round_to_int8(model: PreTrainedModel) -> None:
    """Replace the weights of linear layers, the head's included, by the nearest that 8-bit integers can express.

    The model then computes in floats what a step computes in integers, so that anything can be compared with it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            whole, factor = int8_rows(module.weight)
            module.weight.copy_(whole * factor[:, None])
