"""One answer from an outline and the text of each of its points."""

from __future__ import annotations

import re
from collections.abc import Sequence

from decoding.strategies.outline import Point


def merge(points: Sequence[Point], texts: Sequence[str]) -> str:
    """The answer: one numbered paragraph a point, "1. **Title**: text", counted anew where the outline has gaps.

    texts: what was generated for each point, in the same order; "" leaves the title alone.
    """
    pairs = zip(points, texts, strict=True)
    return "\n\n".join(write_point(number, point, text) for number, (point, text) in enumerate(pairs, 1))


def write_point(number: int, point: Point, text: str) -> str:
    """One paragraph of the answer, with the number it has there."""
    text = tidy(point, text)
    if not text:
        return f"{number}. **{point.title}**"
    colon = "" if point.title[-1:] in tuple("?!？！") else ":"
    return f"{number}. **{point.title}**{colon} {text}"


def tidy(point: Point, text: str) -> str:
    """A point's own text: without its heading, without the points that follow it, without half a sentence at the end.

    The last sentence stays, finished or not, if it is all there is.
    """
    return _finished(_own(point, _without_heading(point, text))).strip()


def _without_heading(point: Point, text: str) -> str:
    number = rf"(?:{point.index}\s*[.)、:：-]\s*)?"
    title = r"[\s*_`]+".join(re.escape(word) for word in point.title.split())
    # A sentence may begin with the words of the title; a heading ends in punctuation, a dash or the line.
    heading = re.compile(
        rf"[\s#*_>\"“]*{number}[*_\"“]*{title}[*_\"”]*\s*(?:[:：][*_]*|\.(?=\s|$)[*_]*|[-–—](?=\s)|\n|$)", re.IGNORECASE
    )
    for _ in range(2):  # "3. Title: **Title**: text"
        match = heading.match(text)
        text = text[match.end() :] if match else text
    text = re.sub(rf"^[\s*_]*{point.index}[.)]\s+", "", text)
    return re.sub(r"^[\s:：]+", "", text)


def _own(point: Point, text: str) -> str:
    """Cuts where the text goes on to the next point, unless the number belongs to a list of its own."""
    following = re.search(rf"^\s*(?:#+\s*)?(?:\*\*)?{point.index + 1}[.)、:：]", text, re.MULTILINE)
    if following is None or re.search(r"^\s*(?:\*\*)?1[.)、:：]", text[: following.start()], re.MULTILINE):
        return text
    return text[: following.start()]


_SENTENCE_END = re.compile(
    r"(?:(?<!\b[A-Z])(?<!\b[Dd]r)(?<!\b[Mm]rs)(?<!\b[Mm]r)(?<!\bvs)(?<!\b[Ee]\.g)(?<!\b[Ii]\.e)(?<!^\d)"
    r"[.!?…]+[\"'”’)\]*_`]*(?=\s|$)|[。！？][」』”]*)"
)
_OWN_LINE = re.compile(r"\s*(?:[-*+•|>#`]|\d+[.)]|\$\$)")  # list item, table row, heading, code: no sentence needed


def _finished(text: str) -> str:
    lines = text.rstrip().split("\n")
    last = lines[-1]
    if _OWN_LINE.match(last) and not last.lstrip().startswith("**"):
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(last)]
    kept = "\n".join([*lines[:-1], last[: ends[-1]] if ends else ""]).rstrip()
    return kept or text
