"""One answer from an outline and the text of each of its points, while all of them are still being written.

However the texts are cut into pieces, and in whatever order they arrive, the answer is the same; what may be shown
of it only grows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from decoding.strategies.outline import Point


def merge(points: Sequence[Point], texts: Sequence[str]) -> str:
    """The answer: one numbered paragraph a point, "1. **Title**: text", counted anew where the outline has gaps.

    texts: what was generated for each point, in the same order, all cut off at a limit; "" leaves the title alone.
    """
    answer = Composition()
    for point, text in zip(points, texts, strict=True):
        place = answer.add(point)
        answer.feed(place, text)
        answer.finish(place)
    return answer.text


def tidy(point: Point, text: str, *, truncated: bool = True) -> str:
    """A point's own text: without its heading, without the points that follow it, without half a sentence at the end.

    truncated: the text was cut off at a limit; otherwise its end is what the model wanted and stays. Half a sentence
    stays, too, if it is all there is.
    """
    own = PointText(point)
    own.feed(text)
    own.finish(truncated=truncated)
    return own.text


class Composition:
    """An answer in the making.

    text: as much of it as is certain: everything up to the first point that is not finished, and of that one the
    finished sentences.
    """

    def __init__(self) -> None:
        self.text = ""
        self._points: list[Point] = []
        self._texts: list[PointText] = []
        self._next = 0  # the first point that is not all in `text`
        self._used = -1  # how much of that one's own text is; -1 before its title

    def add(self, point: Point) -> int:
        """The outline has one more point. Returns its place, from 0."""
        self._points.append(point)
        self._texts.append(PointText(point))
        self._advance()
        return len(self._points) - 1

    def feed(self, place: int, piece: str) -> None:
        """More text for a point."""
        self._texts[place].feed(piece)
        self._advance()

    def finish(self, place: int, *, truncated: bool = True) -> None:
        """A point has all its text. truncated: it was cut off at a limit."""
        self._texts[place].finish(truncated=truncated)
        self._advance()

    def own(self, place: int) -> str:
        """A point's own text, as far as it is certain."""
        return self._texts[place].text

    def _advance(self) -> None:
        while self._next < len(self._points):
            point, own = self._points[self._next], self._texts[self._next]
            if self._used < 0:
                self.text += ("\n\n" if self._next else "") + f"{self._next + 1}. **{point.title}**"
                self._used = 0
            if len(own.text) > self._used:
                if self._used == 0:
                    self.text += " " if point.title[-1:] in tuple("?!？！") else ": "
                self.text += own.text[self._used :]
                self._used = len(own.text)
            if not own.finished:
                return
            self._next, self._used = self._next + 1, -1


class PointText:
    """The text of one point, without what does not belong to it.

    text: what is certain so far. A beginning that may turn out to be the heading once more is held back, and so is an
    unfinished sentence, which is dropped if the limit cuts it. finished: there will be no more.
    """

    def __init__(self, point: Point) -> None:
        self.text = ""
        self.finished = False
        self._point = point
        self._head: str | None = ""  # the beginning, until it is clear what of it is heading
        self._line = ""  # the line that is being written
        self._taken = 0  # how much of it is in `text` or `_gap`
        self._gap = ""  # white space behind `text`, which belongs to it once something follows
        self._listed = False  # a list of its own has begun, so "3." need not be the next point
        self._closed = False  # the next point has begun

    def feed(self, piece: str) -> None:
        """More text."""
        if self._head is not None:
            self._head, piece = self._after_heading(self._head, piece)
        *lines, last = (self._line + piece).split("\n")
        for line in lines:
            if self._belongs(line):
                self._take(line, len(line))
                self._gap += "\n"
            self._line, self._taken = "", 0
        self._line = last
        ends = [end for end in _sentence_ends(last) if end < len(last)]  # at the end of the text it may be "3.5"
        if ends and self._belongs(last):
            self._take(last, ends[-1])

    def finish(self, *, truncated: bool) -> None:
        """There is no more text."""
        if self._head is not None:
            rest = _without_heading(self._point, self._head)
            self._head = None
            self.feed(rest)
        line = self._line
        if line.strip() and self._belongs(line):
            whole = not truncated or (_OWN_LINE.match(line) and not line.lstrip().startswith("**"))
            ends = _sentence_ends(line)
            if whole or not (ends or self.text):
                self._take(line, len(line))
            elif ends:
                self._take(line, ends[-1])
        self.finished = True

    def _after_heading(self, head: str, piece: str) -> tuple[str | None, str]:
        """Adds to the beginning until it can be no heading any more; returns what is held back, and what goes on."""
        letters = _letters(head)
        title, number = _letters(self._point.title), str(self._point.index)
        headings = [a + title + b + title + c for a in ("", number) for b in ("", number) for c in ("", number)]
        for place, character in enumerate(piece):
            head += character
            letters += _letters(character)
            if not any(heading.startswith(letters) for heading in headings):
                return None, _without_heading(self._point, head) + piece[place + 1 :]
        return head, ""

    def _belongs(self, line: str) -> bool:
        """Whether a line is this point's, and not the beginning of the next one."""
        if not self._closed and re.match(r"\s*(?:\*\*)?1[.)、:：]", line):
            self._listed = True
        elif not self._listed and re.match(rf"\s*(?:#+\s*)?(?:\*\*)?{self._point.index + 1}[.)、:：]", line):
            self._closed = True
        return not self._closed

    def _take(self, line: str, end: int) -> None:
        more = self._gap + line[self._taken : end]
        self._taken = max(self._taken, end)
        kept = more.rstrip()
        self._gap = more[len(kept) :]
        self.text += kept if self.text else kept.lstrip()


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.casefold())


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


_SENTENCE_END = re.compile(
    r"(?:(?<!\b[A-Z])(?<!\b[Dd]r)(?<!\b[Mm]rs)(?<!\b[Mm]r)(?<!\bvs)(?<!\b[Ee]\.g)(?<!\b[Ii]\.e)(?<!^\d)"
    r"[.!?…]+[\"'”’)\]*_`]*(?=\s|$)|[。！？][」』”]*)"
)
_OWN_LINE = re.compile(r"\s*(?:[-*+•|>#`]|\d+[.)]|\$\$)")  # list item, table row, heading, code: no sentence needed


def _sentence_ends(line: str) -> list[int]:
    return [match.end() for match in _SENTENCE_END.finditer(line)]
