"""Every error this package raises on purpose, in one tree.

    DecodingError
    ├── InvalidRequest      a prompt, parameter or question that cannot be decoded (also a ValueError)
    │   ├── ContextOverflow     the prompt does not fit the model's context
    │   └── UnknownName         no model, strategy, drafter or option of that name; the message offers the nearest
    ├── ModelError          a model that cannot be loaded, or cannot be run by the engine
    ├── CapabilityError     the strategy needs something that the backend does not have
    └── RecordError         a run directory or record file that cannot be read or written

Messages are one sentence that says what is wrong and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DecodingError(Exception):
    """Base of every error raised on purpose by this package."""


class InvalidRequest(DecodingError, ValueError):
    """A prompt, parameter or question that cannot be decoded."""


class ContextOverflow(InvalidRequest):
    """The prompt does not fit the model's context."""


class UnknownName(InvalidRequest):
    """No model, strategy, drafter or option of that name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """`kind` is what was looked up ("strategy"), `known` every name that would have been found."""
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(known)}."
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class ModelError(DecodingError):
    """A model that cannot be loaded, or cannot be run by the engine."""


class CapabilityError(DecodingError):
    """The strategy needs something that the backend does not have."""


class RecordError(DecodingError):
    """A run directory or record file that cannot be read or written."""
