"""Greedy decoding twice, by transformers and by an engine with any decoders, and prompts for both."""

from __future__ import annotations

from collections.abc import Sequence as List

import numpy as np
import torch
from transformers import PreTrainedModel

from decoding.engine.decoder import Decoder
from decoding.engine.engine import Engine
from decoding.engine.sequence import Sequence
from decoding.types import SamplingParams

VOCAB = 128
"""Prompts hold ids below this."""


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Ragged random prompts with repetitions in them, so that prompt lookup finds something."""
    random = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        piece = random.integers(3, VOCAB, size=random.integers(2, 9)).tolist()
        result.append((piece * 4)[: int(random.integers(3, 30))])
    return result


def greedy_reference(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([prompt])
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def run(engine: Engine, work: List[tuple[list[int], Decoder]], params: SamplingParams) -> list[Sequence]:
    """Submit everything, then step until nothing is left."""
    sequences = [engine.submit(prompt, params, decoder) for prompt, decoder in work]
    for _ in range(10_000):
        if not engine.busy:
            return sequences
        engine.step()
    raise AssertionError("the engine does not come to an end")
