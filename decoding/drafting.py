"""The contract between speculative decoding and a drafter, and where drafters are found by name.

The drafters that come with the project live in the top-level package `drafters`; it is imported when the first
one is asked for by name.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from decoding.engine.block import Block, Commit
from decoding.errors import UnknownName
from decoding.textform import TextForm, build, parse_call

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence

REGISTRY: dict[str, type[Drafter]] = {}


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses for one sequence.

    block: the tokens, as a chain or a tree.
    probabilities: [guesses, vocab] the distribution each was sampled from, temperature and filters
        applied ([1 + guesses, vocab] for a tree, see `confirm`); None if the guesses were not sampled
        (n-grams, most likely tokens). What was sampled is verified whole: withholding a guess because of
        what it is would change the output's distribution.
    confidence: [guesses] how likely each is right if its parent is, in [0, 1]; None if the drafter cannot
        say. Used to choose how many to verify; what comes true corrects it.
    sources: [guesses] who guessed each, where several drafters did.
    """

    block: Block = Block()
    probabilities: torch.Tensor | None = None
    confidence: List[float] | None = None
    sources: List[str] | None = None


class Drafter(TextForm, ABC):
    """Proposes continuations. Works on all sequences at once and never changes one.

    A subclass that sets `name` is found under it. Options are the fields of a dataclass, so that
    `my-drafter(option=3)` works wherever a drafter is named.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    trust: ClassVar[float] = 0.6
    """How likely a guess is thought to come true before any did or did not, if the drafter states a cost."""

    weighed: float = 0.0
    """Seconds of all its guessing so far that the drafter has weighed against their use itself: these are not held
    against it again."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            REGISTRY[cls.name] = cls

    def attach(self, backend: LocalBackend) -> None:
        """Called once, before anything else, with the backend whose model will verify."""

    @abstractmethod
    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        """Guess up to `lengths[i]` tokens behind `sequences[i].tokens`; an empty draft decodes plainly."""

    def cost(self, levels: int, sequences: int, context: float) -> float:
        """Seconds that guessing takes, for so many levels, sequences and committed tokens in each; the same at every
        call. The length of a draft is then decided before it is made. A drafter that samples has to say it.

        0 for what is small: it is measured, by the clock, and a sequence for which drafts do not pay is left alone,
        see `engine.width`.
        """
        return 0.0

    def observe(self, sequences: List[Sequence], output: Output, commits: List[Commit]) -> None:
        """Learn from a verification: what was guessed, what the target said, what was kept. Not called for sequences
        that are left alone in this step."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""

    def unlearn(self) -> None:
        """Drop whatever earlier requests taught, so that the next one starts afresh."""


def names() -> dict[str, type[Drafter]]:
    """Every drafter that can be named."""
    importlib.import_module("drafters")
    return REGISTRY


def find(text: str) -> Drafter:
    """A new drafter from its text form, `name` or `name(option=value, …)`.

    Raises UnknownName with the nearest names, InvalidRequest for options that do not fit.
    """
    name, options = parse_call(text)
    known = names()
    if name not in known:
        raise UnknownName("drafter", name, known)
    drafter = build(known[name], name, options)
    assert isinstance(drafter, Drafter)
    return drafter
