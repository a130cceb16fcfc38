"""How much memory a piece of work needed at most."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

import torch

from decoding.backends.base import Backend
from decoding.backends.local import LocalBackend

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager; afterwards `peak` is the most memory, in bytes, in use inside it.

    On a CUDA device what the tensor library allocated there; otherwise the resident memory of this
    process where Linux reports it; None elsewhere.
    """

    def __init__(self, backend: Backend) -> None:
        self._cuda = backend.device if isinstance(backend, LocalBackend) and backend.device.type == "cuda" else None
        self.peak: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5")  # resets the high-water mark
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda is not None:
            self.peak = torch.cuda.max_memory_allocated(self._cuda)
            return
        try:
            lines = _STATUS.read_text().splitlines()
        except OSError:
            return
        self.peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
