"""What a line of a list starts with: its number or bullet, in the many ways models write them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple


class Style(NamedTuple):
    """What tells one level of a list from another: `1.`, `(1)`, `## 1.` and `Step 1:` differ."""

    delimiter: str = ""
    heading: int = 0
    word: str = ""


class Numbering(NamedTuple):
    """A way to count. The pattern has a group `n`, and where they exist `word`, `open` and `delimiter`."""

    pattern: re.Pattern[str]
    value: Callable[[str], int | None]


class Marker(NamedTuple):
    """The start of a list item; `number` is None for a bullet, `rest` the text after it, `indent` in columns."""

    numbering: Numbering
    style: Style
    indent: int
    number: int | None
    rest: str


class Inline(NamedTuple):
    """A list on one line: the text before its first number, and the items with their numbers."""

    style: Style
    before: str
    items: list[tuple[int, str]]


_ROMAN = tuple("I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX".split(" "))  # noqa: SIM905


def _roman(text: str) -> int | None:
    return _ROMAN.index(text.upper()) + 1 if text.upper() in _ROMAN else None


def _chinese(text: str) -> int | None:
    digits = "〇一二三四五六七八九"
    tens, ten, ones = text.rpartition("十")
    if len(tens) > 1 or len(ones) > 1 or "十" in tens:
        return None
    return (10 * (digits.index(tens) if tens else 1) if ten else 0) + (digits.index(ones) if ones else 0)


def _letter(text: str) -> int:
    return ord(text.upper()) - ord("A") + 1


def _numbering(pattern: str, value: Callable[[str], int | None] = int) -> Numbering:
    return Numbering(re.compile(pattern), value)


# A number that goes on ("1.1", "10:30", "1.a)") is no marker. "1-2" needs a space after the dash to be one.
_AFTER_DIGITS = (
    r"(?P<delimiter>\s?\\?[.．](?!\d|[a-z][.)])|[)）\]】]|、|[:：](?!\d)|\s*[-–—](?=\s)|\ufe0f?\u20e3|(?=\*\*|__))"
)
_AFTER_LETTERS = r"(?P<delimiter>[.)）:])(?=\s|$)"
_WORD = r"(?P<word>[^\W\d_]{2,12})\s+"
_OPEN = r"(?P<open>[(（]?)"

ARABIC = _numbering(r"(?P<open>[(（\[【]?)#?(?P<n>\d{1,2})" + _AFTER_DIGITS)
WORD_AND_DIGITS = _numbering(_WORD + r"#?(?P<n>\d{1,2})" + _AFTER_DIGITS)
BULLETS = _numbering(r"[•‣◦●○▪►➤・]\s*|[-*+–—·✓✔✅]\s+", lambda n: None)
_NUMBERINGS = (
    ARABIC,
    WORD_AND_DIGITS,
    _numbering(r"(?P<n>[①-⑳❶-❿])", lambda n: int(unicodedata.numeric(n))),
    _numbering(_WORD + r"(?P<n>[IVX]{1,5})(?P<delimiter>[.:]|\s*[-–—])(?=\s)", _roman),
    _numbering(r"(?P<word>第)(?P<n>\d{1,2})(?P<delimiter>[^\s\d:：、，,]{0,2}[:：、，,\s])"),
    _numbering(
        r"(?P<word>第?)" + _OPEN + r"(?P<n>[一二三四五六七八九十]{1,3})"
        r"(?P<delimiter>[点點步章节節部分]{0,2}[、．.)）:：，,])",
        _chinese,
    ),
    _numbering(_OPEN + r"(?P<n>[IVX]{1,5})" + _AFTER_LETTERS, _roman),
    _numbering(_OPEN + r"(?P<n>[ivx]{1,5})" + _AFTER_LETTERS, _roman),
    _numbering(_OPEN + r"(?P<n>[A-J])" + _AFTER_LETTERS, _letter),
    _numbering(_OPEN + r"(?P<n>[a-j])" + _AFTER_LETTERS, _letter),
)
_GAP = r"(?:\*\*|__)?\s"  # what separates a number from the text behind it in the middle of a line
_HEADING = re.compile(r"#{1,6}\s+")
_EMPHASIS = re.compile(r"(?:\*{1,3}|__)(?=\S)")


def read_marker(line: str, numbering: Numbering | None = None) -> Marker | None:
    """The number, in the given numbering or in any, or the bullet that `line` starts with."""
    line = line.lstrip("\ufeff").expandtabs(4).rstrip()
    body = line.lstrip(" \u00a0\u3000>")
    indent = len(line) - len(body)
    heading = _HEADING.match(body)
    body = body[heading.end() :] if heading else body
    bullet = BULLETS.pattern.match(body)
    body = body[bullet.end() :] if bullet else body
    emphasis = _EMPHASIS.match(body)
    mark = emphasis[0] if emphasis else ""
    for candidate in _NUMBERINGS if numbering is None else (numbering,):
        match = candidate.pattern.match(body, len(mark))
        number = candidate.value(match["n"]) if match and candidate is not BULLETS else None
        if match is None or number is None:
            continue
        groups = {name: group or "" for name, group in match.groupdict().items()}
        delimiter = unicodedata.normalize("NFKC", groups.get("open", "") + groups.get("delimiter", "")).strip(" \\")
        style = Style(delimiter, heading[0].count("#") if heading else 0, groups.get("word", "").casefold())
        rest = body[match.end() :]
        # "**1.** Title" closes its emphasis before the title, "**1. Title**" after it.
        rest = rest[len(mark) :] if mark and rest.startswith(mark) else mark + rest.lstrip()
        return Marker(candidate, style, indent, number, rest.strip())
    if bullet and numbering in (None, BULLETS):
        return Marker(BULLETS, Style("•"), indent, None, body.strip())
    return None


def read_inline(text: str, number: int, style: Style | None = None) -> Inline | None:
    """Splits "a 2. b 3. c", given that number 2 comes next; None unless at least two numbers follow one another.

    One alone could be prose ("World War 2. Causes"), and taking it for an item would cost the rest of the list.
    """
    form = rf"[(（]?{{n}}(?:[.)]{_GAP}|、)" if style is None else _inline_form(style)
    pieces: list[tuple[int, int]] = []  # where the number starts, where its text starts
    while form:
        marker = form.replace("{n}", str(number + len(pieces)))
        match = re.compile(rf"(?:^|(?<=[\s;；,，。]))(?:\*\*|__)?{marker}").search(text, pieces[-1][1] if pieces else 0)
        if match is None:
            break
        pieces.append(match.span())
    if len(pieces) < 2:
        return None
    ends = [start for start, _ in pieces[1:]] + [len(text)]
    items = [(number + i, _loose(text[pieces[i][1] : end])) for i, end in enumerate(ends)]
    first = text[slice(*pieces[0])].replace(str(number), "").strip("*_ ")
    return Inline(style or Style(unicodedata.normalize("NFKC", first)), _loose(text[: pieces[0][0]]), items)


def _inline_form(style: Style) -> str:
    """The pattern of a number inside a line, written like the one the line started with; "" if there is none."""
    if style.word or style.delimiter[-1:] not in tuple(".)]、:"):
        return ""
    opened, closed = re.escape(style.delimiter[:-1]), style.delimiter[-1]
    return opened + "{n}" + (closed if closed == "、" else re.escape(closed) + _GAP)


def _loose(text: str) -> str:
    """An item without what joins it to the next one: "a, and" is "a"."""
    return re.sub(r"[\s,;，；]*(?:\band)?\s*$", "", text)
