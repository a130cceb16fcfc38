"""Comparing greedy answers token for token, with true ties as the one excuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

TIE = 1e-4


@torch.inference_mode()
def greedy_violations(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[list[int], int]:
    """Positions in `tokens` that are not the model's choice given everything before them, and how many are true ties.

    One plain, unbatched forward pass over the whole text says what the model would choose at every position; by
    induction, no violation means that `tokens` is what greedy decoding gives. Where it disagrees, the position is run
    again in float64: if the two best tokens lie within 1e-4 of each other and `tokens` took one of them, it is a tie.
    """
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    choices = model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    violations, ties = [], 0
    for place, (token, choice) in enumerate(zip(tokens, choices, strict=True)):
        if token == choice:
            continue
        precise = _double(model)(ids[:, : len(prompt) + place]).logits[0, -1]
        if abs(float(precise[token] - precise[choice])) < TIE and float(precise.max() - precise[token]) < TIE:
            ties += 1
        else:
            violations.append(place)
    return violations, ties


_doubles: dict[int, PreTrainedModel] = {}


def _double(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy, made when the first tie needs it."""
    if id(model) not in _doubles:
        copy = type(model)(model.config).double().eval()
        copy.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
        _doubles[id(model)] = copy
    return _doubles[id(model)]
