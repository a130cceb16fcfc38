"""Parallel decoding on one shared batched engine: Skeleton-of-Thought, speculation, iterative refinement.

>>> import decoding
>>> lm = decoding.load("smollm2-135m")
>>> decoding.generate("Why do leaves change colour?", lm, strategy=decoding.Jacobi()).text
"""

from typing import TYPE_CHECKING, Any

from decoding.api import generate, load, resolve, stream
from decoding.backends.base import Backend
from decoding.backends.local import LocalBackend
from decoding.backends.openai import OpenAIBackend
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

if TYPE_CHECKING:
    from decoding.comparison import compare
    from decoding.report import read_run

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


def __getattr__(name: str) -> Any:
    """What needs the report's libraries is imported when it is first used."""
    if name == "compare":
        from decoding.comparison import compare

        return compare
    if name == "read_run":
        from decoding.report import read_run

        return read_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
