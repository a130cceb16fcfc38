"""Prompt lookup: what followed the last few tokens the last time they occurred in this text.

Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.errors import InvalidRequest
from decoding.textform import is_count

if TYPE_CHECKING:
    from decoding.engine.sequence import Sequence

_LONG_MATCH = 16


@dataclass(eq=False)
class PromptLookup(Drafter):
    """Matches n-grams of the text's end, longest first, most recent occurrence first.

    max_ngram, min_ngram: lengths of the n-grams that are looked up, in tokens.
    """

    max_ngram: int = 3
    min_ngram: int = 1

    name: ClassVar[str] = "prompt-lookup"
    summary: ClassVar[str] = "n-grams that occurred earlier in the prompt or answer"

    _indices: dict[int, _Index] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_count(self.min_ngram) or not is_count(self.max_ngram, self.min_ngram):
            raise InvalidRequest(
                f"prompt-lookup needs integers 1 ≤ min_ngram ≤ max_ngram, not {self.min_ngram!r} and "
                f"{self.max_ngram!r}."
            )

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        drafts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            index = self._indices.setdefault(sequence.id, _Index(self.min_ngram, self.max_ngram))
            at = index.find(sequence.tokens)
            if at and length > 0:
                matched = _matched(sequence.tokens, at)
                guesses = _continuation(sequence.tokens, at, length)
                drafts.append(Draft(Block(guesses), confidence=[match_worth(matched + i) for i in range(length)]))
            else:
                drafts.append(Draft())
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence.id, None)


class _Index:
    """Where each n-gram of a growing text ended last."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(shortest, longest + 1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0

    def find(self, tokens: List[int]) -> int:
        """Position after the latest earlier occurrence of the longest n-gram that ends `tokens`; 0 if none."""
        # The n-grams that end the text are left for the next call: they must not match themselves.
        for end in range(self._known + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._known = max(self._known, len(tokens) - 1)
        for size in reversed(self._sizes):
            found = self._ends.get(tuple(tokens[-size:])) if size < len(tokens) else None
            if found is not None:
                return found
        return 0


@cache
def match_worth(matched: int) -> float:
    """A first guess at the chance that what followed `matched` tokens the last time follows them again. A guess that
    comes true lengthens the match, so that the next one is worth more."""
    return 1 - 0.65 * 0.8 ** (matched - 1)


def _matched(tokens: List[int], at: int) -> int:
    """How many tokens before `at` are those that end the text, as far as that makes a difference."""
    count = 1
    while count < min(at, _LONG_MATCH) and tokens[at - 1 - count] == tokens[-1 - count]:
        count += 1
    return count


def _continuation(tokens: List[int], start: int, length: int) -> list[int]:
    """`length` tokens from `start` on; past the end of the text, the repetition goes on."""
    period = len(tokens) - start
    if period >= length:
        return list(tokens[start : start + length])
    return [tokens[start + i % period] for i in range(length)]
