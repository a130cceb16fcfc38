"""The target's own weights, as 8-bit integers, guess for the target in full precision.

After Tiwari et al. 2025, "QuantSpec" (self-speculation by a quantised copy): a copy that reads a quarter of the bytes
is right nearly always, so drafts can be long, and every answer is still the full model's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from decoding.engine.precision import round_to_int8
from decoding.engine.runner import Runner
from decoding.errors import ModelError
from drafters.draft_model import DraftModel, Follower

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from decoding.backends.local import LocalBackend


@dataclass(eq=False)
class Quantised(DraftModel):
    """Needs the compiled step (a CPU and a C++ compiler): only there are 8-bit weights faster."""

    model: str | PreTrainedModel = field(default="", init=False)

    name: ClassVar[str] = "quantised"
    summary: ClassVar[str] = "the target's own weights in 8 bits; for a target in full precision"

    def attach(self, backend: LocalBackend) -> None:
        """Raises ModelError where 8-bit weights would not be faster than the target's."""
        target = backend.engine.runner
        if target.fused is None:
            raise ModelError(
                "the drafter quantised needs the compiled step, which this device or model does not have; use "
                "another drafter, such as layer-skip or mixed."
            )
        if target.fused.weights != "float32":
            raise ModelError(
                f"{backend.name} runs on {target.fused.weights} weights already, so a quantised copy of it guesses no "
                "faster; load it in float32 or use another drafter."
            )
        rounded = copy.deepcopy(backend.model)
        round_to_int8(rounded)
        cache = target.cache
        self._backend = backend
        self._follower = Follower(Runner(rounded, cache.slots, cache.capacity, weights="int8"))
