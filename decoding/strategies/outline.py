"""From the text of an outline to its points, while the text is still being written.

Skeleton-of-Thought (Ning et al., 2024) asks for a numbered list; models answer with `1.`, `1)`, `**Step 1:**`,
`一、`, bullets, lists inside lists, or everything on one line. The rules, in the order they matter:

- The first number that is a one ("1.", "I.", "a)", "一、"), or the first bullet, opens the list and sets its style.
- A number opens a point only at the start of a line, or in a line that counts on by itself ("1. a 2. b 3. c").
- Deeper indentation or another style is a list inside the point; such lines belong to it and are not points.
- Numbers rise; a number that falls back is another list (a repeated answer, say), and there the outline ends.
- Points without a title, and points that repeat an earlier one, are dropped; two repeats in a row are a loop, and
  the outline ends there too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from decoding.strategies.outline_marker import ARABIC, WORD_AND_DIGITS, Numbering, Style, read_inline, read_marker
from decoding.strategies.outline_title import overlong, split_needs, trim_title


@dataclass(frozen=True)
class Point:
    """One point of an outline.

    index: its number as written; numbers rise, but may leave gaps where a point was dropped.
    title: what it is about, without markdown and without trailing explanation.
    needs: indices of the earlier points whose text it builds on, in rising order.
    """

    index: int
    title: str
    needs: tuple[int, ...] = ()


def parse_outline(text: str, *, max_points: int = 10) -> list[Point]:
    """The points of a complete outline; empty when there is no list in it.

    Text that was pre-filled (the "1." that starts the answer) belongs to the outline and must be passed too.
    """
    parser = OutlineParser(max_points=max_points)
    return parser.feed(text) + parser.finish()


def steered(text: str) -> str | None:
    """The outline to go on with instead of `text`, its beginning; None where the model should just write on.

    A title that has become a sentence is ended, and the next number, which is no secret, is put behind it and behind
    every line that is complete. Whoever writes the numbers into the prompt computes them with the token behind them, in
    one pass instead of several; and a small model that is given them neither explains its points nor loses count.
    """
    body = text.rstrip(" \n")
    start = body.rfind("\n") + 1
    marker = read_marker(body[start:])
    at = body.rfind(marker.rest, start) if marker and marker.rest else -1
    if marker is None or marker.number is None or at < 0 or str(marker.number) not in body[start:at]:
        return None  # not a numbered point, or one numbered in letters
    if "\n" not in text[len(body) :]:
        title = overlong(marker.rest)
        if title is None:
            return None
        body = body[:at] + title
    number = body[start:at].replace(str(marker.number), str(marker.number + 1), 1)
    return f"{body}\n{number.rstrip()}"


class OutlineParser:
    """Parses an outline as it arrives; however the text is cut into chunks, the points are the same.

    points: all points so far.
    dropped: one sentence for each point or dependency that was left out, in the order of the text.
    done: nothing that follows can add a point (enough points, the list started over, or it loops), so the
        outline need not be generated any further.
    """

    def __init__(self, *, max_points: int = 10) -> None:
        self.points: list[Point] = []
        self.dropped: list[str] = []
        self.done = max_points < 1
        self._max_points = max_points
        self._pending = ""  # the line that is still being written
        self._numbering: Numbering | None = None
        self._style: Style | None = None
        self._indent = 0
        self._last = 0  # index of the newest point that had a title
        self._nested = False  # inside a list that belongs to the newest point
        self._titles: dict[str, int] = {}  # normalised title → index
        self._same_as: dict[int, int] = {}  # index of a point, dropped ones included → index of the point kept
        self._repeats = 0  # in a row

    def feed(self, chunk: str) -> list[Point]:
        """The points that `chunk` completes; a point is complete once the next line starts."""
        *lines, self._pending = (self._pending + chunk).split("\n")
        return [point for line in lines for point in self._read(line)]

    def finish(self, *, truncated: bool = False) -> list[Point]:
        """The points that the end of the text completes.

        truncated: the text was cut off (token limit), so its last point may be half a title and is left out.
        """
        line, self._pending = self._pending, ""
        return self._read(line, truncated=truncated)

    def _read(self, line: str, *, truncated: bool = False) -> list[Point]:
        found = [] if self.done else self._items(line)
        if truncated and found:
            index, _ = found.pop()
            self.dropped.append(f"Point {index} was cut off before it was complete.")
        points = []
        for index, text in found:
            point = None if self.done else self._add(index, text)
            if point is not None:
                points.append(point)
        return points

    def _items(self, line: str) -> list[tuple[int, str]]:
        """Numbers and texts of the points that start in `line`: none, one, or several of a one-line list."""
        marker = read_marker(line, self._numbering)
        if marker is None:
            if self._numbering is None and (inline := read_inline(line, 1)):
                self._numbering, self._style = ARABIC, inline.style
                return inline.items
            return []
        if self._numbering is None:
            if marker.number not in (1, None):
                return []
            self._numbering, self._style, self._indent = marker.numbering, marker.style, marker.indent
        number = self._last + 1 if marker.number is None else marker.number
        if marker.indent > self._indent + 1 or marker.style != self._style:
            # Another level, or another way to write the same one: only the number that comes next is a point.
            if self._nested or number != self._last + 1 or (marker.number is None and self._last):
                self._nested = True
                return []
        elif number <= self._last:
            self.done = True
            return []
        self._nested = False
        inline = read_inline(marker.rest, number + 1, marker.style)
        if inline is None:
            return [(number, marker.rest)]
        return [(number, inline.before), *inline.items]

    def _add(self, index: int, text: str) -> Point | None:
        text, wanted = split_needs(text)
        title = trim_title(_without_repeated_number(text, index))
        if not title:
            self.dropped.append(f"Point {index} has no title.")
            return None
        self._last = index
        kept = self._titles.setdefault(" ".join(re.findall(r"\w+", title.casefold())), index)
        self._same_as[index] = kept
        self._repeats = self._repeats + 1 if kept != index else 0
        if kept != index:
            self.dropped.append(f"Point {index} repeats point {kept}.")
            self.done = self._repeats > 1
            return None
        needs = set()
        for other in wanted:
            if other in self._same_as and other != index:
                needs.add(self._same_as[other])
            else:
                self.dropped.append(f"Point {index} cannot need {other}, which is not an earlier point.")
        point = Point(index, title, tuple(sorted(needs)))
        self.points.append(point)
        self.done = len(self.points) >= self._max_points
        return point


def _without_repeated_number(text: str, index: int) -> str:
    """The title in "1. Title" or "Step 1: Title" for a point that already had the number 1 before it."""
    for numbering in (ARABIC, WORD_AND_DIGITS):
        marker = read_marker(text, numbering)
        if marker and marker.number == index and marker.style.delimiter:
            return marker.rest
    return text
