"""Threads that share a backend take turns at its engine.

Every `generate` runs an event loop, and so does every `stream`, in a thread of its own. An engine that two of them
stepped would mix their sequences up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from decoding.errors import InvalidRequest

HELD_UP: ContextVar[frozenset[asyncio.AbstractEventLoop]] = ContextVar("HELD_UP", default=frozenset())
"""Event loops that go on only when the work of this context is done."""

_PAUSE = 0.002  # seconds between two looks whether it is one's turn


class Turns:
    """`async with turns:` waits until no other event loop is inside. Those that wait come in the order in which they
    asked; all tasks of a loop go in together.

    Raises InvalidRequest if the loop inside waits for this one, so that neither could go on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: dict[asyncio.AbstractEventLoop, int] = {}  # tasks of each that are inside or want to be

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        self._join(loop)
        try:
            while (first := self._first(loop)) is not loop:
                if first in HELD_UP.get():
                    raise InvalidRequest(
                        "this model is in the middle of an answer that waits for this call; make it when the answer "
                        "is there, or await `strategy.answer(…)` beside it."
                    )
                await asyncio.sleep(_PAUSE)
        except BaseException:
            self._leave(loop)
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave(asyncio.get_running_loop())

    @contextmanager
    def now(self) -> Iterator[bool]:
        """Go in without waiting. Gives whether it is the turn of this thread's event loop; if not, stay out."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # there is none, nor anything that could go on here meanwhile
            yield not self._line
            return
        self._join(loop)
        try:
            yield self._first(loop) is loop
        finally:
            self._leave(loop)

    def _join(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._line[loop] = self._line.get(loop, 0) + 1

    def _first(self, loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
        """Whose turn it is. A loop that was stopped has none: it may never go on."""
        with self._lock:
            while (first := next(iter(self._line))) is not loop and not first.is_running():
                del self._line[first]
            return first

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            left = self._line.get(loop, 0) - 1
            if left > 0:
                self._line[loop] = left
            else:
                self._line.pop(loop, None)
