"""Weights in fewer bits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

WEIGHTS = ("float32", "int8", "int4")
"""Names of what the weights of linear layers can be held in during a step."""

GROUP = 32
"""Columns of a row that share a scale and a minimum in four bits: as in the Q4_1 of GGUF files, whose weights four bits
therefore hold as they are."""


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] as 8-bit integers, and the factor [rows] that each row was divided by."""
    factor = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / factor[:, None]).round().clamp(-127, 127).to(torch.int8), factor


def int4_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[rows, columns] as integers 0 to 15 [rows, groups, GROUP], and each group's scale and minimum [rows, groups] in
    half precision: a weight is a multiple of the scale above the minimum."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    minimum = groups.amin(-1).half()
    above = groups - minimum.float()[..., None]
    scale = (above.amax(-1) / 15).half()
    whole = (above / scale.float()[..., None].clamp(min=1e-12)).round().clamp(0, 15).to(torch.uint8)
    return whole, scale, minimum


def kept_as(weights: str, columns: int, *, head: bool) -> str:
    """What a matrix is held in when a model is loaded with `weights`: the head, whose rows are the vocabulary's, and
    what does not divide into groups, in no fewer than 8 bits."""
    return "int8" if weights == "int4" and (head or columns % GROUP) else weights


@torch.no_grad()
def round_weights(model: PreTrainedModel, weights: str) -> None:
    """Replace the weights of linear layers by the nearest that `weights` can express.

    The model then computes in floats what a step computes in integers, so that anything can be compared with it.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        kind = kept_as(weights, module.in_features, head=module is head)
        if kind == "int8":
            whole, factor = int8_rows(module.weight)
            module.weight.copy_(whole * factor[:, None])
        elif kind == "int4":
            whole, scale, minimum = int4_groups(module.weight)
            module.weight.copy_((whole * scale.float()[..., None] + minimum.float()[..., None]).flatten(1))
