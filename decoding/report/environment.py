"""Where a run took place: machine, versions and the exact source it ran from."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

PACKAGES = ("parallel-decoding", "torch", "transformers", "accelerate", "numpy", "scipy", "tokenizers", "safetensors")
"""Distributions whose versions can change tokens or times."""


@dataclass(frozen=True)
class Environment:
    """The machine and software of a run.

    python, platform, processor: as the interpreter and the operating system name them.
    cores: logical processors this process may use; threads: those the tensor library uses.
    memory: bytes of main memory, 0 if unknown.
    device, dtype: where the model ran and in which number format; accelerator: its name, "" on a CPU.
    kernels: what computed the steps, see `Runner.kernels`; "" where the engine did not.
    compile_seconds: what compiling layers took when the model was loaded, 0 if none are.
    versions: distribution name → version, for those installed.
    git_commit: commit of the source, "" outside a checkout; git_dirty: whether tracked files differed from it.
    load: processes that wanted to run, averaged over the minute before the start; 0 if unknown.
    """

    python: str = ""
    platform: str = ""
    processor: str = ""
    cores: int = 0
    threads: int = 0
    memory: int = 0
    device: str = ""
    dtype: str = ""
    accelerator: str = ""
    kernels: str = ""
    compile_seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    git_commit: str = ""
    git_dirty: bool = False
    load: float = 0.0


def environment(
    *,
    device: str = "cpu",
    dtype: str = "",
    kernels: str = "",
    compile_seconds: float = 0.0,
    packages: Iterable[str] = PACKAGES,
) -> Environment:
    """Describe this process's environment. Never fails: what cannot be found out stays empty."""
    commit, dirty = _git_state(Path(__file__))
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        processor=_processor(),
        cores=_cores(),
        threads=_threads(),
        memory=_memory(),
        device=device,
        dtype=dtype,
        accelerator=_accelerator(device),
        kernels=kernels,
        compile_seconds=round(compile_seconds, 2),
        versions=_versions(packages),
        git_commit=commit,
        git_dirty=dirty,
        load=_load(),
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def _threads() -> int:
    # The tensor library is asked only if the run has loaded it: describing a run must not cost its import.
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else _cores()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _load() -> float:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return 0.0


def _accelerator(device: str) -> str:
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return ""
    return str(torch.cuda.get_device_name(device))


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_state(source: Path) -> tuple[str, bool]:
    """Commit and dirtiness of the checkout that tracks `source`; ("", False) if none does.

    An installed copy may lie inside somebody else's repository, so the file itself has to be tracked.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source.parent), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", source.name) is None:
        return "", False
    return git("rev-parse", "HEAD") or "", bool(git("status", "--porcelain", "--untracked-files=no"))
