"""What a step costs on this machine, beside what physics asks for at least.

Two floors: no step is faster than reading its bytes at the memory's speed, none faster than its multiplications at the
processor's (the roofline). Both speeds are measured here, with the tensor library's own sum and matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from decoding.backends.local import LocalBackend
from decoding.engine.latency import LatencyModel, latency_of
from decoding.engine.precision import GROUP, kept_as
from decoding.report.curves import Curve, chart
from decoding.report.runfile import write_text

_BYTES = 2**28  # read to measure the memory's speed: more than any cache holds
_SIDE = 1536  # of the matrices multiplied to measure the processor's
_TRIALS = 5


@dataclass(frozen=True)
class Calibration:
    """A latency model and the floors under it.

    bandwidth: bytes per second that can be read. peak: multiply-adds per second. weights: bytes that every step reads.
    work: multiply-adds per token. took: seconds of the measurement. kernels: what computed the steps. compiled: seconds
    that compiling layers took when the model was loaded, 0 if none are.
    """

    latency: LatencyModel
    bandwidth: float
    peak: float
    weights: int
    work: int
    took: float
    kernels: str
    compiled: float

    @property
    def reading(self) -> float:
        """Seconds below which no step can be: its weights have to be read."""
        return self.weights / self.bandwidth

    def computing(self, tokens: float) -> float:
        """Seconds below which no step over so many tokens can be: they have to be multiplied."""
        return tokens * self.work / self.peak

    def table(self) -> Table:
        """Costs by tokens, for the terminal."""
        model = self.latency
        table = Table(title=f"One sequence on {model.device}", caption=self._caption(), caption_justify="left")
        for name in ("tokens", "ms", "× one token", "ms per token", "floor, ms", "bound by"):
            table.add_column(name, justify="left" if name == "bound by" else "right")
        one = model.cost(1, 1, 0)
        for tokens, _ in model.curve:
            seconds = model.cost(tokens, 1, 0)
            floor = max(self.reading, self.computing(tokens))
            table.add_row(
                str(tokens),
                f"{seconds * 1e3:.1f}",
                f"{seconds / one:.2f}",
                f"{seconds / tokens * 1e3:.2f}",
                f"{floor * 1e3:.1f}",
                "memory" if floor == self.reading else "arithmetic",
            )
        return table

    def _caption(self) -> str:
        model = self.latency
        compiled = f" (compiled in {self.compiled:.1f} s)" if self.compiled else ""
        return (
            f"Computed by {self.kernels}{compiled}. "
            f"{self.bandwidth / 1e9:.1f} GB/s read, {self.peak / 1e9:.0f}·10⁹ multiply-adds/s; "
            f"a step reads {self.weights / 1e6:.0f} MB of weights. Another sequence adds "
            f"{model.per_sequence * 1e6:.1f} µs, a key that is attended to {model.per_read * 1e6:.2f} µs. "
            f"Predictions of {len(model.held_out)} steps that were not fitted are off by {model.error:.1%} (median). "
            f"Measured in {self.took:.1f} s."
        )

    def plot(self, path: Path) -> None:
        """Cost against tokens with both floors, as an SVG file. Raises RecordError if it cannot be written."""
        at = [tokens for tokens, _ in self.latency.curve]

        def curve(label: str, seconds: Callable[[int], float]) -> Curve:
            return Curve(
                label,
                [(n, seconds(n) * 1e3) for n in at],
                [f"{label}: {n} tokens, {seconds(n) * 1e3:.1f} ms" for n in at],
            )

        curves = [
            curve("one sequence", lambda n: self.latency.cost(n, 1, 0)),
            curve("bytes ÷ bandwidth", lambda n: self.reading),
            curve("operations ÷ peak", self.computing),
        ]
        for m in self.latency.held_out:
            said = f"{m.tokens} tokens, {m.sequences} sequences, {m.context} behind each"
            predicted = self.latency.cost(m.tokens, m.sequences, m.context)
            curves.append(
                Curve(
                    f"{said}: {m.seconds * 1e3:.1f} ms, predicted {predicted * 1e3:.1f}", [(m.tokens, m.seconds * 1e3)]
                )
            )
        write_text(
            path, chart(f"Cost of a step on {self.latency.device}", "tokens in the step", "milliseconds", curves)
        )


def calibrate(backend: LocalBackend) -> Calibration:
    """Measure a backend's steps anew, keep the latency model in the cache, and measure the floors."""
    runner = backend.engine.runner
    began = time.perf_counter()
    latency = latency_of(runner, again=True)
    took = time.perf_counter() - began
    backend.__dict__["latency"] = latency
    matrices = {m.weight.data_ptr(): m for m in runner.model.modules() if isinstance(m, nn.Linear)}
    entries = sum(m.weight.numel() for m in matrices.values())
    held = "float32" if runner.fused is None else runner.fused.weights
    head = runner.model.get_output_embeddings()
    kinds = [(m, kept_as(held, m.in_features, head=m is head)) for m in matrices.values()]
    sizes = {"float32": runner.model.dtype.itemsize, "int8": 1, "int4": 0.5 + 4 / GROUP}  # two halves for a group
    return Calibration(
        latency=latency,
        bandwidth=_bandwidth(runner.device),
        peak=_peak(runner.device, runner.model.dtype),
        weights=round(sum(m.weight.numel() * sizes[kind] for m, kind in kinds)),
        work=entries,
        took=took,
        kernels=runner.kernels,
        compiled=runner.compile_seconds,
    )


def _best(device: torch.device, call: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIALS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _bandwidth(device: torch.device) -> float:
    data = torch.ones(_BYTES // 4, device=device)
    return _BYTES / _best(device, lambda: data.sum())


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    data = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    return float(_SIDE**3 / _best(device, lambda: data @ data))
