"""transformers' own generate, float32. Modes: plain, lookup (prompt lookup), assisted (by the model's first layers)."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM
from worker import Generate, serve


def load(folder: str, gguf: str, mode: str) -> Generate:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    extra: dict[str, object] = {}
    if mode == "lookup":
        extra["prompt_lookup_num_tokens"] = 5
    elif mode == "assisted":
        assistant = copy.deepcopy(model)
        assistant.model.layers = assistant.model.layers[:4]
        assistant.config.num_hidden_layers = 4
        extra["assistant_model"] = assistant

    def generate(texts: list[str], ids: list[list[int]], tokens: int) -> list[int]:
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        out = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
        return [out.shape[1] - width] * len(ids)

    return generate


serve(load)
