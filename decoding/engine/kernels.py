"""The faster of two exact ways to multiply a few tokens with a weight matrix on a CPU.

Matrix libraries are tuned for many rows, and which of them is fastest for 1, 4 or 32 depends on the processor: the
tensor library's own call may take twice as long for two tokens as for one. So every way is timed once per layer
shape and number of tokens when a model is loaded, and the fastest is used (the idea of FlashDecoding++'s heuristic
dataflow, Hong et al. 2024). All compute in float32 and differ by rounding only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

Kernel = Callable[..., torch.Tensor]
"""As `F.linear`: [..., tokens, in], [out, in] and perhaps a bias [out] to [..., tokens, out]."""

TOKENS = (2, 4, 8, 16, 32, 64)
"""Numbers of tokens that are timed; a step uses the choice for the next higher one. A wider step uses `F.linear`, and
so does a single token, where there is nothing to choose: both are a matrix-vector product."""

_TRIALS = 4
_ROWS = 4096  # of a larger weight, as many are timed


def flipped(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`weight @ xᵀ`: the long side is the one that is split over threads and blocks."""
    out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], -1)


KERNELS: Mapping[str, Kernel] = {"linear": F.linear, "flipped": flipped}
# Not here, though it may be faster alone: NumPy's BLAS. Its threads and the tensor library's wait for work by spinning,
# and take the cores from each other.


class FastLinears:
    """Computes a model's linear layers by the fastest kernels during a step; outside of one the model is as it was.

    choices: weight shape → the kernel's name for each of `TOKENS`. Layers of any other class than `nn.Linear`, in
    another precision than float32, or on an accelerator keep their own forward.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [
            module
            for module in model.modules()
            if type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"
        ]
        weights: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for layer in layers:
            weights.setdefault(tuple(layer.weight.shape), []).append(layer.weight.detach())
        self.choices = {shape: fastest_kernels(members) for shape, members in weights.items()}
        classes = [(layer, _by_tokens(tuple(self.choices[tuple(layer.weight.shape)]))) for layer in layers]
        self._classes = [(layer, kind) for layer, kind in classes if kind is not nn.Linear]

    @contextmanager
    def active(self, tokens: int) -> Iterator[None]:
        """For the duration of a step over so many tokens; with a single one there is nothing to choose."""
        if tokens == 1:
            yield
            return
        for layer, kind in self._classes:
            layer.__class__ = kind
        try:
            yield
        finally:
            for layer, _ in self._classes:
                layer.__class__ = nn.Linear


@cache
def _by_tokens(names: tuple[str, ...]) -> type[nn.Linear]:
    """The class of linear layers that use the kernels of these names for up to each of `TOKENS`.

    A class, and not a function put into each layer: compiled code is shared between layers whose parts are of the same
    classes. It is told by ranges of tokens, so that it is compiled once for each of them.
    """
    ranges: list[tuple[int, Kernel]] = []  # (most tokens, kernel), neighbours being different ones
    for most, name in zip((1, *TOKENS), ("linear", *names), strict=True):
        if ranges and ranges[-1][1] is KERNELS[name]:
            del ranges[-1]
        ranges.append((most, KERNELS[name]))
    if ranges[-1][1] is F.linear:  # as beyond them
        del ranges[-1]
    if not ranges:
        return nn.Linear

    class ByTokens(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            tokens = input.numel() // input.shape[-1]
            for most, kernel in ranges:
                if tokens <= most:
                    return kernel(input, self.weight, self.bias)
            return F.linear(input, self.weight, self.bias)

    return ByTokens


@torch.inference_mode()
def fastest_kernels(weights: Sequence[torch.Tensor]) -> list[str]:
    """Names of the fastest kernel for each of `TOKENS`, by the best of a few times over weights of one shape.

    Different weights are used in turn, so that they come from memory as they do in a step.
    """
    samples = [part for weight in weights for part in weight.split(_ROWS)]
    samples = [sample for sample in samples if len(sample) == len(samples[0])]
    place = 0
    names = []
    for tokens in TOKENS:
        x = torch.ones(tokens, samples[0].shape[1])
        best = dict.fromkeys(KERNELS, float("inf"))
        for _ in range(_TRIALS):
            for name, kernel in KERNELS.items():
                sample = samples[place % len(samples)]
                place += 1
                began = time.perf_counter()
                kernel(x, sample)
                best[name] = min(best[name], time.perf_counter() - began)
        names.append(min(best, key=lambda name: best[name]))
    return names
