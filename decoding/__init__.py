"""Parallel decoding on one shared batched engine: Skeleton-of-Thought, speculation, iterative refinement.

>>> import decoding
>>> lm = decoding.load("smollm2-135m")
>>> decoding.generate("Why do leaves change colour?", lm, strategy=decoding.Jacobi()).text
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decoding.api import generate, load, resolve, stream
    from decoding.backends.base import Backend
    from decoding.backends.local import LocalBackend
    from decoding.backends.openai import OpenAIBackend
    from decoding.comparison import compare
    from decoding.drafting import Draft, Drafter
    from decoding.engine.block import Block, Commit
    from decoding.engine.decoder import Decoder
    from decoding.errors import (
        CapabilityError,
        ContextOverflow,
        DecodingError,
        InvalidRequest,
        ModelError,
        RecordError,
        UnknownName,
    )
    from decoding.report import read_run
    from decoding.strategies import (
        Autoregressive,
        BlockDiffusion,
        Jacobi,
        Lookahead,
        MaskPredict,
        SkeletonOfThought,
        Speculative,
        Strategy,
        TokenStrategy,
    )
    from decoding.trace import Metrics, Step
    from decoding.types import Generation, SamplingParams

__all__ = [
    "Autoregressive",
    "Backend",
    "Block",
    "BlockDiffusion",
    "CapabilityError",
    "Commit",
    "ContextOverflow",
    "Decoder",
    "DecodingError",
    "Draft",
    "Drafter",
    "Generation",
    "InvalidRequest",
    "Jacobi",
    "LocalBackend",
    "Lookahead",
    "MaskPredict",
    "Metrics",
    "ModelError",
    "OpenAIBackend",
    "RecordError",
    "SamplingParams",
    "SkeletonOfThought",
    "Speculative",
    "Step",
    "Strategy",
    "TokenStrategy",
    "UnknownName",
    "compare",
    "generate",
    "load",
    "read_run",
    "resolve",
    "stream",
]


_MODULES = (
    "errors",
    "trace",
    "types",
    "drafting",
    "backends.base",
    "engine.block",
    "api",
    "backends.local",
    "backends.openai",
    "engine.decoder",
    "strategies",
    "report",
    "comparison",
)
"""Where public names are looked for, in this order."""


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used: torch takes seconds, and whoever asks for help need not wait."""
    if name in __all__:
        for module in _MODULES:
            found = importlib.import_module(f"{__name__}.{module}")
            if hasattr(found, name):
                return globals().setdefault(name, getattr(found, name))
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
