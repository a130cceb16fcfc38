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

import torch
from torch import nn
from torch.nn import functional as F

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""[tokens, in] and [out, in] to [tokens, out]."""

_TOKENS = (2, 4, 8, 16, 32, 64)
"""Numbers of tokens that are timed; a step uses the choice for the next higher one. A wider step uses `F.linear`, and
so does a single token, where there is nothing to choose: both are a matrix-vector product."""

_TRIALS = 4
_ROWS = 4096  # of a larger weight, as many are timed


def flipped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`weight @ xᵀ`: the long side is the one that is split over threads and blocks."""
    return torch.mm(weight, x.t()).t()


KERNELS: Mapping[str, Kernel] = {"linear": F.linear, "flipped": flipped}
# Not here, though it may be faster alone: NumPy's BLAS. Its threads and the tensor library's wait for work by spinning,
# and take the cores from each other.


class FastLinears:
    """Computes a model's linear layers by the fastest kernels during a step; outside of one the model is as it was.

    choices: weight shape → the kernel's name for each of `_TOKENS`. Layers of any other class than `nn.Linear`, in
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
        self._forwards = [(layer, _Forward(layer, self.choices[tuple(layer.weight.shape)])) for layer in layers]

    @contextmanager
    def active(self, tokens: int) -> Iterator[None]:
        """For the duration of a step over so many tokens; with a single one there is nothing to choose."""
        if tokens == 1:
            yield
            return
        for layer, forward in self._forwards:
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                del layer.__dict__["forward"]


class _Forward:
    """The `forward` of one linear layer during a step."""

    def __init__(self, layer: nn.Linear, names: Sequence[str]) -> None:
        self._weight = layer.weight.detach()
        self._bias = None if layer.bias is None else layer.bias.detach()
        # by the bit length of tokens - 1, which is the index of the next power of two
        self._kernels = [F.linear, *(KERNELS[name] for name in names)]

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        tokens = input.numel() // input.shape[-1]
        size = max(tokens - 1, 0).bit_length()
        if size >= len(self._kernels) or self._kernels[size] is F.linear:
            return F.linear(input, self._weight, self._bias)
        out = self._kernels[size](input.reshape(tokens, -1), self._weight)
        if self._bias is not None:
            out = out + self._bias
        return out.view(*input.shape[:-1], -1)


@torch.inference_mode()
def fastest_kernels(weights: Sequence[torch.Tensor]) -> list[str]:
    """Names of the fastest kernel for each of `_TOKENS`, by the best of a few times over weights of one shape.

    Different weights are used in turn, so that they come from memory as they do in a step.
    """
    samples = [part for weight in weights for part in weight.split(_ROWS)]
    samples = [sample for sample in samples if len(sample) == len(samples[0])]
    place = 0
    names = []
    for tokens in _TOKENS:
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
