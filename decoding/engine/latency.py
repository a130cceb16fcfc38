"""What a step costs: measured once per model, device, precision and number of threads, then looked up.

The time of a step hardly grows with its tokens until the processor has as much to compute as the memory has to read;
how many tokens that slack has room for is what drafts, refinement and parallel points are sized by.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from decoding.engine.block import Block
from decoding.engine.packing import Row
from decoding.errors import ModelError

if TYPE_CHECKING:
    from decoding.engine.runner import Runner

logger = logging.getLogger(__name__)

_LAYOUT = "latency-2"
"""Part of the path: raise it when a measurement would mean something else."""

_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_SHORT = 32  # tokens of context in most measurements
_ROUNDS = 3
_HELD_OUT = ((5, 1, 160), (10, 2, 96), (20, 4, 64), (40, 8, 48), (16, 16, 48), (1, 1, 320), (28, 28, 48), (7, 1, 32))
"""(tokens, sequences, context) of steps that the model is not fitted to but judged by."""

_CHUNKS = (64, 512)
"""Fewest and most tokens in a step of which prompts are a part."""


@dataclass(frozen=True)
class Measured:
    """One kind of step, `tokens` in all over `sequences` of equal length with `context` tokens each behind them, and
    the least of its seconds in a few rounds: whatever else the machine did can only have made it slower."""

    tokens: int
    sequences: int
    context: int
    seconds: float


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of a step, from measurements of one model on one machine.

    A step costs what its tokens cost, read off a curve through `curve`; and, linearly, `per_sequence` for every
    sequence but the first, and `per_read` for every key that a token attends to.

    device: the processor's name. held_out: steps that the model was not fitted to.
    """

    device: str
    curve: tuple[tuple[int, float], ...]
    per_sequence: float
    per_read: float
    held_out: tuple[Measured, ...] = ()

    @cached_property
    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        tokens, seconds = np.array(self.curve).T
        return tokens, seconds

    def cost(self, tokens: Any, sequences: Any, context: Any) -> Any:
        """Seconds of a step over `tokens` tokens in all, of `sequences` sequences with `context` tokens each behind
        them; a float for numbers, and for arrays, which broadcast, an array."""
        tokens = np.asarray(tokens, dtype=float)
        at, seconds = self._points
        time = np.interp(tokens, at, seconds)
        slope = (seconds[-1] - seconds[-2]) / (at[-1] - at[-2])
        time = time + np.maximum(tokens - at[-1], 0) * max(slope, 0)  # beyond the last point, as steep as before it
        time = time + self.per_sequence * (np.asarray(sequences) - 1) + self.per_read * tokens * np.asarray(context)
        return time if time.ndim else float(time)

    def step_tokens(self) -> int:
        """How many tokens a step holds when prompts are read: enough for 95 % of the tokens per second that any number
        gives, and no more, since sequences that decode wait for them."""
        tokens = np.arange(_CHUNKS[0], _CHUNKS[1] + 1, 32)
        rate = tokens / self.cost(tokens, 1, 0)
        return int(tokens[np.argmax(rate >= 0.95 * rate.max())])

    @property
    def error(self) -> float:
        """The median of |predicted ÷ measured - 1| over the steps held out."""
        gaps = [abs(self.cost(m.tokens, m.sequences, m.context) / m.seconds - 1) for m in self.held_out]
        return float(np.median(gaps)) if gaps else float("nan")


def latency_of(runner: Runner, weights: str | None = None, *, again: bool = False) -> LatencyModel:
    """The latency model of a runner: from the user's cache, or measured now, which takes some seconds.

    weights: of steps with these (see `Runner.hold`). again: measure even if there is one. Needs a free slot, or raises
    ModelError; with fewer of them, fewer sequences are tried at once.
    """
    path = _path(runner, weights)
    if not again and (known := _read(path)) is not None:
        return known
    logger.info("measuring what steps of this model cost here; this happens once.")
    model = measure(runner, weights)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(asdict(model), file)
        os.replace(file.name, path)
    except OSError:
        pass  # it is measured again next time
    return model


def step_tokens(runner: Runner) -> int:
    """`LatencyModel.step_tokens` if steps of this runner were ever measured here, the most otherwise."""
    known = _read(_path(runner))
    return _CHUNKS[1] if known is None else known.step_tokens()


def measure(runner: Runner, weights: str | None = None) -> LatencyModel:
    """Time steps of many kinds in turn, and fit the model to the fastest of each."""
    cache = runner.cache
    if not cache.free:
        raise ModelError(
            "what a step costs is measured once, and needs a free slot; ask for `backend.latency` before all of them "
            "are busy, or load the model with more slots."
        )
    slots = [cache.acquire([0])[0] for _ in range(min(cache.free, 32))]
    try:
        room = max(cache.capacity - max(_TOKENS), 0)
        fitted = [(n, 1, min(_SHORT, room)) for n in _TOKENS if n < cache.capacity]
        fitted += [(n, 1, min(longer, room)) for n in (1, 8, 32) for longer in (256, 768) if room >= longer]
        fitted += [
            (n * len(some), len(some), min(_SHORT, room))
            for some in _several(slots)
            for n in (1, 4)
            if n < cache.capacity
        ]
        held_out = [
            kind for kind in _HELD_OUT if kind[1] <= len(slots) and kind[0] // kind[1] + kind[2] < cache.capacity
        ]
        for layer in (*cache.keys, *cache.values):  # pages that were never written to cost nothing to read
            layer[slots[0], :, : max(context for _, _, context in fitted)] = 0
        times: dict[tuple[int, int, int], list[float]] = {kind: [] for kind in [*fitted, *held_out]}
        for _ in range(_ROUNDS):
            for kind, seconds in times.items():
                seconds.append(_time(runner, weights, slots, *kind))
        least = {kind: min(seconds) for kind, seconds in times.items()}
    finally:
        for slot in slots:
            cache.lengths[slot] = 0
            cache.release(slot)
    measured = [Measured(*kind, least[kind]) for kind in fitted]
    return _fit(device_name(runner.device), measured, [Measured(*kind, least[kind]) for kind in held_out])


def _several(slots: Sequence[int]) -> list[Sequence[int]]:
    return [slots[:count] for count in (4, 8, 16) if count <= len(slots)]


def _time(
    runner: Runner, weights: str | None, slots: Sequence[int], tokens: int, sequences: int, context: int
) -> float:
    """Seconds of one step; what it writes lies behind what counts, and is discarded."""
    rows = []
    for slot in slots[:sequences]:
        runner.cache.lengths[slot] = context
        rows.append(Row(slot, [1], Block([1] * (tokens // sequences - 1))))
    began = time.perf_counter()
    logits = runner.forward(rows, weights=weights)
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    return time.perf_counter() - began


def _fit(device: str, measured: Sequence[Measured], held_out: Sequence[Measured]) -> LatencyModel:
    """The curve passes through the single sequences with little behind them; the rest gives the two slopes."""
    single = sorted({m.tokens: m for m in reversed(measured) if m.sequences == 1}.values(), key=lambda m: m.tokens)
    seconds = _rising([m.seconds for m in single])
    tokens = np.array([m.tokens for m in single])
    others = [m for m in measured if m not in single]
    per_sequence = per_read = 0.0
    for _ in range(3):  # the curve's own points have context behind them, too
        bare = seconds - per_read * tokens * [m.context for m in single]
        if others:
            # relative errors count, so that short steps are not drowned by long ones
            rest = [(m.seconds - np.interp(m.tokens, tokens, bare)) / m.seconds for m in others]
            terms = [[(m.sequences - 1) / m.seconds, m.tokens * m.context / m.seconds] for m in others]
            slopes, *_ = np.linalg.lstsq(np.array(terms), np.array(rest), rcond=None)
            per_sequence, per_read = max(float(slopes[0]), 0.0), max(float(slopes[1]), 0.0)
    bare = _rising(seconds - per_read * tokens * [m.context for m in single])
    curve = tuple((int(n), float(s)) for n, s in zip(tokens, bare, strict=True))
    return LatencyModel(device, curve, per_sequence, per_read, tuple(held_out))


def _rising(seconds: Sequence[float] | np.ndarray) -> np.ndarray:
    """More tokens cannot take less time: what stands above a later point was disturbed."""
    return np.minimum.accumulate(np.asarray(seconds, dtype=float)[::-1])[::-1]


def device_name(device: torch.device) -> str:
    """What the processor calls itself."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _path(runner: Runner, weights: str | None = None) -> Path:
    from decoding.gguf_cache import cache_root

    shape = {name: value for name, value in runner.config.to_dict().items() if isinstance(value, (int, str, bool))}
    what = (
        sorted(shape.items()),
        runner.kernels if weights is None else f"fused {weights}",
        "" if runner.fused is None else runner.fused.build,
        str(runner.model.dtype),
        device_name(runner.device),
        torch.get_num_threads(),
        torch.__version__,
        runner.cache.capacity,
        runner.cache.slots,
    )
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    return cache_root() / _LAYOUT / f"{runner.config.model_type}-{key}.json"


def _read(path: Path) -> LatencyModel | None:
    try:
        data = json.loads(path.read_text())
        return LatencyModel(
            device=data["device"],
            curve=tuple((int(n), float(s)) for n, s in data["curve"]),
            per_sequence=float(data["per_sequence"]),
            per_read=float(data["per_read"]),
            held_out=tuple(Measured(**each) for each in data["held_out"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
