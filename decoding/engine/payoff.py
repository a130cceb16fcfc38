"""Whether asking a drafter pays: the time that its drafts save, against the time of the host's that they take.

For drafters that state no cost: looking up n-grams takes a fraction of a millisecond, which is nothing beside a long
step, and much beside a short one or for many sequences. So it is measured, by the clock, and held against what the
drafts promise. Only how soon an answer comes depends on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager

_RECENT = 15  # steps whose median tells what asking takes: a pause of the machine, or a long prompt, is one of them
_FIRST = 8  # drafts of a sequence before it may rest
_NEW = 0.1  # weight of a sequence's latest draft


class Payoff:
    """Keeps account of what asking for a draft takes and saves.

    clock: what tells the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._taken: deque[float] = deque(maxlen=_RECENT)  # seconds per sequence asked, of the last steps
        self._saved: dict[int, tuple[int, float]] = {}  # drafts of a sequence, and what one saves: a fading mean
        self._price = 0.0  # the median of what was taken
        self._spent = 0.0
        self._asked: frozenset[int] = frozenset()

    @contextmanager
    def timing(self) -> Iterator[None]:
        """The time inside is the drafter's."""
        began = self._clock()
        try:
            yield
        finally:
            self._spent += self._clock() - began

    def settle(self, weighed: float = 0.0) -> float:
        """Close the account of the last step, leaving out `weighed` seconds of it. Returns what asking takes now, in
        seconds per sequence."""
        if self._asked:
            self._taken.append(max(0.0, self._spent - weighed) / len(self._asked))
            self._price = sorted(self._taken)[len(self._taken) // 2]
            self._asked = frozenset()
        self._spent = 0.0
        return self._price

    def pays(self, sequence: int) -> bool:
        """Whether a sequence's drafts have been worth asking for lately, or too few have been made to know."""
        count, saved = self._saved.get(sequence, (0, 0.0))
        return count < _FIRST or saved >= self._price

    def asked(self, sequences: List[int]) -> None:
        """For these sequences a draft is asked for in this step."""
        self._asked = frozenset(sequences)

    def saved(self, sequence: int, seconds: float) -> None:
        """The draft of this step is expected to save so much time, if one was asked for."""
        if sequence in self._asked:
            count, mean = self._saved.get(sequence, (0, 0.0))
            count += 1
            self._saved[sequence] = count, mean + max(_NEW, 1 / count) * (seconds - mean)

    def forget(self, sequence: int) -> None:
        """The sequence has ended."""
        self._saved.pop(sequence, None)

    def unlearn(self) -> None:
        """Drop what was learnt of texts; what asking takes on this machine stays known."""
        self._saved.clear()
