"""Parallel decoding on one shared batched engine: Skeleton-of-Thought, speculation, iterative refinement.

>>> import decoding
>>> lm = decoding.load("smollm2-135m")
>>> decoding.generate("Why do leaves change colour?", lm, strategy=decoding.Jacobi()).text
"""

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
    Jacobi,
    Lookahead,
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
    "generate",
    "load",
    "resolve",
    "stream",
]
