"""The faster of two exact ways to multiply a few tokens with a weight matrix on a CPU.

Matrix libraries are tuned for many rows; for 2 to 64 tokens, `weight @ tokensᵀ` is often twice as fast as
`tokens @ weightᵀ`, because the long side of the product is then the one that is split over threads and blocks.
Which one wins is measured, not assumed. One token is a matrix-vector product either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

_WIDEST = 64
_TRIALS = (4, 32)  # tokens


def flipped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What `F.linear` computes: [..., in] and [out, in] to [..., out], stored the other way round."""
    flat = x.reshape(-1, x.shape[-1])
    if not 2 <= flat.shape[0] <= _WIDEST:
        return F.linear(x, weight, bias)
    out = torch.mm(weight, flat.t()).t()
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], -1)


class FlippedLinears:
    """Computes a model's linear layers by `flipped_linear` during a step, if that is faster here.

    Layers of any other class than `nn.Linear`, in another precision than float32, or on an accelerator are left
    alone; so is the model outside of `active`.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [
            module
            for module in model.modules()
            if type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"
        ]
        self._layers = layers if layers and _faster([layer.weight for layer in layers]) else []

    def __bool__(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def active(self, tokens: int) -> Iterator[None]:
        """During a step of so many tokens."""
        if not self._layers or not 2 <= tokens <= _WIDEST:
            yield
            return
        for layer in self._layers:
            layer.__dict__["forward"] = _Flipped(layer)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)


class _Flipped:
    """The `forward` of one layer while it is flipped."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return flipped_linear(input, self._layer.weight, self._layer.bias)


@torch.inference_mode()
def _faster(weights: list[torch.Tensor]) -> bool:
    """Whether flipping pays over all layers, by the best of a few times for one layer of each shape."""
    shapes: dict[torch.Size, list[torch.Tensor]] = {}
    for weight in weights:
        shapes.setdefault(weight.shape, []).append(weight)
    ways: tuple[Callable[..., torch.Tensor], ...] = (F.linear, flipped_linear)
    plain = flipped = 0.0
    for members in shapes.values():
        for tokens in _TRIALS:
            x = torch.ones(tokens, members[0].shape[1])
            best = [float("inf")] * 2
            for _ in range(3):
                for way, multiply in enumerate(ways):
                    began = time.perf_counter()
                    multiply(x, members[0], None)
                    best[way] = min(best[way], time.perf_counter() - began)
            plain += best[0] * len(members)
            flipped += best[1] * len(members)
    return flipped < plain
