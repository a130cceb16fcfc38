"""A race: every strategy answers the same question, and the answers are shown growing side by side.

The strategies run one after another, so that they do not take the machine from each other; what is shown is a replay
against the clock that was recorded. So a race is as fair as a comparison of one question can be, and no more.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from decoding.api import run
from decoding.backends.base import Backend
from decoding.strategies import Strategy
from decoding.types import Generation, Prompt, SamplingParams

NARROWEST = 34
"""Characters that a column needs to be read; more strategies than fit go into a second row."""
LOWEST = 6
"""Lines that a column needs."""
FRAMES = 12
"""Pictures of a replay per second."""


@dataclass(frozen=True)
class Moment:
    """One lane at one time: the text so far, new tokens, and forward passes after prefill. A backend that shows no
    steps has None for both until the answer is complete."""

    text: str
    tokens: int | None
    tokens_per_forward: float | None
    finished: bool


@dataclass(frozen=True)
class Lane:
    """One strategy's answer with the time of everything. pieces: (seconds since the start, text)."""

    strategy: str
    generation: Generation
    pieces: Sequence[tuple[float, str]]

    @property
    def seconds(self) -> float:
        """When the answer was complete: its last step, or its last piece of text."""
        return max(self.generation.metrics.seconds, self.pieces[-1][0] if self.pieces else 0.0)

    def at(self, seconds: float) -> Moment:
        """What could be seen `seconds` after the start."""
        metrics, finished = self.generation.metrics, seconds >= self.seconds
        if finished:
            per_forward = metrics.tokens_per_forward if metrics.forwards else None
            return Moment(self.generation.text, metrics.new_tokens, per_forward, True)
        text = "".join(piece for _, piece in self.pieces[: bisect_right(self.pieces, seconds, key=lambda p: p[0])])
        if not self.generation.trace:
            return Moment(text, None, None, False)
        seen = [step for step in self.generation.trace if step.end <= seconds]
        decoding = [step for step in seen if not step.prefill]
        forwards = len({step.step for step in decoding})
        per_forward = sum(step.committed for step in decoding) / forwards if forwards else None
        return Moment(text, sum(step.committed for step in seen), per_forward, False)


def race(
    prompt: Prompt,
    lm: Backend,
    strategies: Sequence[Strategy],
    params: SamplingParams,
    *,
    on_start: Callable[[Strategy], object] = lambda strategy: None,
) -> list[Lane]:
    """Let every strategy answer the prompt, one after another, each after a short warm-up and from a clean cache."""
    for strategy in strategies:
        lm.require(strategy)
    return [_run(prompt, lm, strategy, params, on_start) for strategy in strategies]


def _run(
    prompt: Prompt, lm: Backend, strategy: Strategy, params: SamplingParams, on_start: Callable[[Strategy], object]
) -> Lane:
    on_start(strategy)
    run(strategy.answer(prompt, params.but(max_new_tokens=min(16, params.max_new_tokens), min_new_tokens=0), lm))
    lm.forget()
    pieces: list[tuple[float, str]] = []
    began = time.perf_counter()

    def note(piece: str) -> None:
        pieces.append((time.perf_counter() - began, piece))

    return Lane(str(strategy), run(strategy.answer(prompt, params, lm, note)), pieces)


def replay(lanes: Sequence[Lane], console: Console, *, speed: float = 1.0) -> None:
    """Show the race once more in columns, `speed` times as fast as it was; nothing where there is no terminal to move
    about in, or no room."""
    if not console.is_terminal or console.height // _rows(lanes, console.width) < LOWEST:
        return
    last = max(lane.seconds for lane in lanes)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        began = time.perf_counter()
        while (seconds := (time.perf_counter() - began) * speed) < last:
            live.update(picture(lanes, seconds, console), refresh=True)
            time.sleep(1 / FRAMES)
        live.update(picture(lanes, last, console), refresh=True)


def picture(lanes: Sequence[Lane], seconds: float, console: Console) -> RenderableType:
    """All lanes at one time, in one or more rows of columns that fill the console."""
    rows = _rows(lanes, console.width)
    across = math.ceil(len(lanes) / rows)
    height = max((console.height - 1) // rows, LOWEST)
    first = min((lane.seconds for lane in lanes if lane.generation.error is None), default=math.inf)
    grids = []
    for start in range(0, len(lanes), across):
        grid = Table.grid(expand=True)
        for _ in range(across):
            grid.add_column(ratio=1)
        width = console.width // across - 4  # what a panel's frame leaves
        grid.add_row(*(_panel(lane, seconds, first, width, height, console) for lane in lanes[start : start + across]))
        grids.append(grid)
    return Group(*grids)


def _rows(lanes: Sequence[Lane], width: int) -> int:
    return math.ceil(len(lanes) / max(1, width // NARROWEST))


def _panel(lane: Lane, seconds: float, first: float, width: int, height: int, console: Console) -> Panel:
    moment = lane.at(seconds)
    lines = Text(moment.text).wrap(console, max(width, 1))[-(height - 2) :]  # the end is where something happens
    clock = min(seconds, lane.seconds)
    facts = [f"{clock:.1f} s"]
    if moment.tokens is not None:
        facts.append(f"{moment.tokens} tokens")
    if moment.tokens_per_forward is not None:
        facts.append(f"{moment.tokens_per_forward:.2f} per forward")
    won = moment.finished and lane.seconds <= first
    style = "red" if moment.finished and lane.generation.error else "green" if won else "dim" if moment.finished else ""
    title = Text(lane.strategy, style="bold", no_wrap=True, overflow="ellipsis")
    return Panel(
        Text("\n").join(lines),
        title=title,
        subtitle=Text(" · ".join(facts), no_wrap=True, overflow="ellipsis"),
        height=height,
        border_style=style,
    )


def result_table(lanes: Sequence[Lane]) -> Table:
    """Who came in when: the fastest first. The first strategy that was named is what the others are compared with."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    longest = max(len(lane.strategy) for lane in lanes)
    table.add_column("strategy", overflow="fold", min_width=min(longest, NARROWEST))
    for title in ("seconds", "tokens", "tokens/s", "per forward", "speed-up", "same tokens"):
        table.add_column(title, justify="right")
    if len(lanes) > 1:
        table.caption, table.caption_justify = f"speed-up and same tokens: against {escape(lanes[0].strategy)}", "left"
    reference = lanes[0]
    for lane in sorted(lanes, key=lambda lane: (lane.generation.error is not None, lane.seconds)):
        metrics = lane.generation.metrics
        if lane.generation.error is not None:
            table.add_row(Text(lane.strategy), Text("failed", style="red"))
            continue
        answers = lane.generation, reference.generation
        unknown = lane is reference or any(answer.text and not answer.tokens for answer in answers)  # a server's
        table.add_row(
            Text(lane.strategy),
            f"{lane.seconds:.2f}",
            str(metrics.new_tokens),
            f"{metrics.new_tokens / lane.seconds:.1f}" if lane.seconds else "–",
            f"{metrics.tokens_per_forward:.2f}" if metrics.forwards else "–",
            "–" if lane is reference or not lane.seconds else f"{reference.seconds / lane.seconds:.2f}×",
            "–" if unknown else "yes" if answers[0].tokens == answers[1].tokens else "no",
        )
    return table
