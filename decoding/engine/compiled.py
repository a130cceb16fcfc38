"""A model's own decoder layers, compiled by the tensor library: what `decoding.load(..., compile=True)` switches on.

Compiling a whole model takes a minute or more; one layer takes seconds, and its code serves all layers that are alike.
Nothing is padded: the number of tokens is a variable of the code, which is made anew only for a single token and where
another matrix kernel is the fastest (`decoding.engine.kernels`). Attention stays one call out of the code, since what a
step attends to changes from step to step; so tokens are those of uncompiled layers, ties aside.

What was compiled is kept on disk by the tensor library (its "FX graph cache"), and the next process loads it: from
$TORCHINDUCTOR_CACHE_DIR, by default `torchinductor_USER` in the folder for temporary files.

On a GPU the layers are compiled in the same way, without CUDA graphs. This has not been tried on one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from decoding.engine.attention import enter_layer
from decoding.engine.kernels import TOKENS
from decoding.errors import ModelError

logger = logging.getLogger(__name__)

WARM_UP_SECONDS = 90.0
"""When this has passed, no further layer is compiled. One that was begun goes on to its end, which takes seconds."""

_SIZES = (1, *TOKENS, 2 * TOKENS[-1])
"""Tokens in the steps of the warm-up: between two of them no kernel changes."""

_VARIANTS = 64  # of code at most: a few ranges of tokens, times the kinds of layers, of all models in this process


class CompiledLayers:
    """Runs decoder layers by compiled code during a step; outside of one they are as they were.

    seconds: what the warm-up took, 0 before it. Raises ModelError if something else has taken the layers' place.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        if any("forward" in vars(layer) for layer in layers):
            raise ModelError("there are hooks around them, as where a model is spread over devices.")
        self._forwards = [(layer, self._forward(i, layer)) for i, layer in enumerate(layers)]
        self._until: float | None = None
        self.seconds = 0.0

    def _forward(self, index: int, layer: nn.Module) -> Callable[..., Any]:
        # In half precision every operation rounds, as it does uncompiled, and not only the last of those made one.
        options: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}
        compiled = torch.compile(layer.forward, fullgraph=True, dynamic=True, options=options)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._until is not None and time.perf_counter() > self._until:
                limit = f"it takes longer than {WARM_UP_SECONDS:.0f} seconds"
                raise TimeoutError(f"{limit}; what is compiled is kept, so the next time it takes less.")
            enter_layer(index)
            return compiled(*args, **kwargs)

        return forward

    @contextmanager
    def active(self) -> Iterator[None]:
        """For the duration of a step. After the warm-up no step waits for a compiler: layers for which there is no code
        (with another number of threads, say) run uncompiled."""
        for layer, forward in self._forwards:
            layer.__dict__["forward"] = forward
        try:
            with torch.compiler.set_stance("eager_on_recompile") if self._until is None else nullcontext():
                yield
        finally:
            for layer, _ in self._forwards:
                del layer.__dict__["forward"]

    def warm_up(self, step: Callable[[int], torch.Tensor], capacity: int, loose: float) -> None:
        """Compile all code that steps need, and compare its logits with those of the layers themselves.

        step: runs a step over so many tokens, at most `capacity`, while these layers are active, and gives its logits.
        loose: how far apart rounding may bring them, relative to the largest.

        Raises TimeoutError if it takes too long, ModelError if the logits are others, and whatever the compiler raises.
        """
        began = time.perf_counter()
        self._until = began + WARM_UP_SECONDS
        with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
            for tokens in _SIZES:
                if tokens > capacity:
                    break
                with torch.compiler.set_stance("force_eager"):
                    plain = step(tokens)
                gap = (step(tokens) - plain).abs().max() / plain.abs().max().clamp(min=1e-6)
                if not gap <= loose:
                    raise ModelError(f"the logits would be others (relative difference {float(gap):.2g}).")
        self._until = None
        self.seconds = time.perf_counter() - began
        logger.info("compiled the layers, or read what was compiled before, in %.1f s.", self.seconds)
