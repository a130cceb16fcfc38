"""Refinement films: what the block held in every iteration, and what changed, in the terminal and as an HTML page.

film = shoot("Why is the sky blue?", lm, strategy="jacobi(block_size=8)")
print_film(film)
write_film(film, "film.html")
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from decoding.api import generate, resolve
from decoding.backends.base import Backend
from decoding.backends.local import LocalBackend
from decoding.errors import CapabilityError, RecordError
from decoding.report.fixed_point import FixedPoint, branches, final_text, fixed_point, reels, stationary_places
from decoding.strategies import Strategy
from decoding.trace import Frame
from decoding.types import Generation, Prompt, SamplingParams

_TAIL = 10  # tokens of the text before the block that a line shows
_LINES = 6  # branches of a tree that the terminal shows
_STYLES = {"fixed": "bold green", "stationary": "blue", "wrong": "red", "open": "dim"}


@dataclass(frozen=True)
class Place:
    """One guess. state: "fixed" (right, as all before it), "stationary" (right, behind a wrong one), "wrong", or "open"
    (a mask). changed: it was another token in the iteration before."""

    text: str
    state: str
    changed: bool


@dataclass(frozen=True)
class Iteration:
    """One pass. before: the text's last tokens. branches: the block, as paths. gained: tokens that became text."""

    number: int
    before: Sequence[str]
    branches: Sequence[Sequence[Place]]
    gained: Sequence[str]


@dataclass(frozen=True)
class Reel:
    """One sequence of the answer: all there is, or the outline and each of the points."""

    label: str
    iterations: Sequence[Iteration]


@dataclass(frozen=True)
class Film:
    """An answer and how it came about."""

    prompt: str
    strategy: str
    model: str
    generation: Generation
    statistics: FixedPoint
    reels: Sequence[Reel]


def shoot(
    prompt: Prompt, lm: Backend, *, strategy: Strategy | str = "jacobi", params: SamplingParams | None = None
) -> Film:
    """Answer a prompt and keep what every block held.

    Raises CapabilityError for a backend that does not show tokens.
    """
    strategy = resolve(strategy)
    if not isinstance(lm, LocalBackend):
        raise CapabilityError("a film shows every token of every block, which a server does not; use a local model.")
    with _filming(lm):
        generation: Generation = generate([prompt], lm, strategy=strategy, params=params)[0]
    shots = reels(generation.trace)
    labels = {step.sequence: label for label, part in generation.parts.items() for step in part.trace}
    return Film(
        prompt=prompt if isinstance(prompt, str) else "",
        strategy=str(strategy),
        model=lm.name,
        generation=generation,
        statistics=fixed_point(generation.trace),
        reels=[Reel(labels.get(sequence, ""), _iterations(frames, lm)) for sequence, frames in shots.items()],
    )


def print_film(film: Film, console: Console | None = None) -> None:
    """One line per iteration: the text's end, then the block. Right guesses are green, those behind a wrong one blue,
    wrong ones red and masks grey; what changed since the last iteration is underlined."""
    console = console or Console()
    for reel in film.reels:
        if reel.label:
            console.print(Text(f"\n{reel.label}", style="bold"))
        for shot in reel.iterations:
            shown = shot.branches[:_LINES] or [[]]
            for line, branch in enumerate(shown):
                text = Text(f"{shot.number:>4} " if not line else " " * 5, style="dim")
                text.append("".join(map(_visible, shot.before)) + "│", style="dim")
                for place in branch:
                    style = _STYLES[place.state]
                    text.append(_visible(place.text), style=f"{style} underline" if place.changed else style)
                if not line:
                    text.append(f"  +{len(shot.gained)}", style="dim")
                console.print(text, soft_wrap=True)
            if len(shot.branches) > _LINES:
                console.print(Text(f"     … and {len(shot.branches) - _LINES} other branches", style="dim"))
    console.print()
    for label, value in summary(film.statistics):
        console.print(Text(f"{label:>36}  {value}"))


def summary(statistics: FixedPoint) -> list[tuple[str, str]]:
    """The statistics with their names."""
    return [
        ("iterations", str(statistics.iterations)),
        ("tokens fixed per iteration", f"{statistics.fixed_per_iteration:.2f}"),
        ("iterations per block", f"{statistics.iterations_per_block:.2f}"),
        ("tokens per block", f"{statistics.tokens_per_block:.2f}"),
        ("stationary tokens per iteration", f"{statistics.stationary_per_iteration:.2f}"),
        ("guesses revised per iteration", f"{statistics.revised_per_iteration:.2f}"),
    ]


def write_film(film: Film, path: str | os.PathLike[str]) -> Path:
    """Write the film as one HTML file that loads nothing, and return it. Raises RecordError if that fails."""
    folder = resources.files("decoding.report") / "page"
    script = (folder / "film.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("decoding.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("film.html.j2").render(
        film=film,
        summary=summary(film.statistics),
        visible=_visible,
        style=Markup((folder / "film.css").read_text(encoding="utf-8")),
        script=Markup(script),
        masks=any(p.state == "open" for r in film.reels for i in r.iterations for b in i.branches for p in b),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    target = Path(path)
    try:
        target.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RecordError(f"{target} could not be written ({error.strerror}).") from error
    return target


@contextmanager
def _filming(lm: LocalBackend) -> Iterator[None]:
    for home in (lm, *lm.variants.values()):
        home.engine.filming = True
    try:
        yield
    finally:
        for home in (lm, *lm.variants.values()):  # those that were made meanwhile film, too
            home.engine.filming = False


def _iterations(frames: Sequence[Frame], lm: LocalBackend) -> list[Iteration]:
    pieces = _Pieces(lm)
    text = final_text(frames)
    last: dict[int, set[int]] = {}
    shots = []
    for number, frame in enumerate(frames):
        paths = branches(frame)
        shots.append(
            Iteration(
                number=number,
                before=[pieces.of(token) for token in text[max(0, frame.at - _TAIL) : frame.at]],
                branches=[_places(path, frame.at, text, last, pieces) for path in paths],
                gained=[pieces.of(token) for token in frame.gained],
            )
        )
        last = {}
        for path in paths:
            for place, token in enumerate(path, start=frame.at):
                last.setdefault(place, set()).add(token)
    return shots


def _places(path: list[int], at: int, text: list[int], last: dict[int, set[int]], pieces: _Pieces) -> list[Place]:
    places = []
    stationary = stationary_places(path, text[at:])
    for place, token in enumerate(path):
        right = at + place < len(text) and text[at + place] == token
        state = "open" if token == pieces.mask else "stationary" if stationary[place] else "fixed" if right else "wrong"
        places.append(Place(pieces.of(token), state, token not in last.get(at + place, {token})))
    return places


class _Pieces:
    """The text of single tokens. mask: the one that is shown as a shaded box, if the model has masks."""

    def __init__(self, lm: LocalBackend) -> None:
        self._tokenizer = lm.tokenizer
        self._known: dict[int, str] = {}
        self.mask = None if lm.masking is None else lm.masking.mask
        if self.mask is not None:
            self._known[self.mask] = "▒"

    def of(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = str(self._tokenizer.decode([token]))
        return self._known[token]


def _visible(piece: str) -> str:
    """A token's text on one line."""
    return piece.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "")
