"""The target's own weights, in fewer bits, guess for the target in full precision.

After Tiwari et al. 2025, "QuantSpec" (self-speculation by a quantised copy): a copy that reads a quarter of the bytes,
or less, is right nearly always, so drafts can be long, and every answer is still the full model's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from decoding.engine.precision import WEIGHTS, round_weights
from decoding.engine.runner import Runner
from decoding.errors import InvalidRequest, ModelError
from drafters.draft_model import DraftModel, Follower

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from decoding.backends.local import LocalBackend


@dataclass(eq=False)
class Quantised(DraftModel):
    """weights: "int8" or "int4", fewer bits than the target's.

    Needs the compiled step (a CPU and a C++ compiler): only there are such weights faster.
    """

    model: str | PreTrainedModel = field(default="", init=False)
    weights: str = "int8"

    name: ClassVar[str] = "quantised"
    summary: ClassVar[str] = "the target's own weights in 8 or 4 bits"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS[1:]:
            raise InvalidRequest(f"weights must be {' or '.join(WEIGHTS[1:])}, not {self.weights!r}.")

    def attach(self, backend: LocalBackend) -> None:
        """Raises ModelError where such weights would not be faster than the target's."""
        target = backend.engine.runner
        if target.fused is None:
            raise ModelError(
                "the drafter quantised needs the compiled step, which this device or model does not have; use "
                "another drafter, such as layer-skip or mixed."
            )
        if WEIGHTS.index(target.fused.weights) >= WEIGHTS.index(self.weights):
            raise ModelError(
                f"{backend.name} runs on {target.fused.weights} weights already, so a copy in {self.weights} guesses "
                "no faster; load it in float32 or use another drafter."
            )
        rounded = copy.deepcopy(backend.model)
        round_weights(rounded, self.weights)
        cache = target.cache
        self._backend = backend
        self._follower = Follower(Runner(rounded, cache.slots, cache.capacity, weights=self.weights))
