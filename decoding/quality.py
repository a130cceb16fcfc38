"""How good an answer is, as pure functions of text or token ids.

Every score is between 0 and 1. `score` compares an answer with a question's reference in the way the question
asks for; `similarity` and `common_prefix` compare it with another answer, usually that of plain decoding;
`redundancy` and `coverage` need nothing but the answer and its question.

ROUGE-L and chrF are written out here, so that a figure does not depend on what happens to be installed. They
equal the packages `rouge-score` (on ASCII text, without stemming) and `sacrebleu`; the tests compare them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decoding.questions import Question


def score(question: Question, answer: str, *, turn: int = 0) -> float | None:
    """How well `answer` does against the references of that turn; None if there is nothing to check.

    numeric, exact, contains: 1 or 0 (`numeric_match`, `exact_match`, `contains`). rouge-l, chrf: `rouge_l` and
    `chrf`. With several references, the best one counts.
    """
    references = question.references(turn)
    if question.check is None or not references:
        return None
    compare = {
        "numeric": numeric_match,
        "exact": exact_match,
        "contains": contains,
        "rouge-l": rouge_l,
        "chrf": chrf,
    }[question.check]
    return max(float(compare(answer, reference)) for reference in references)


def similarity(a: str, b: str) -> float:
    """How alike two texts are, for strategies that may change the answer: their ROUGE-L, which is symmetric.

    Two texts without a word are alike. It sees shared words in the same order; it neither sees that two texts mean
    the same in other words nor that one "not" turns the meaning around.
    """
    return rouge_l(a, b) if _words(a) or _words(b) else 1.0


def redundancy(points: Sequence[str], *, order: int = 3) -> float:
    """How much the parts of an answer repeat each other: of the runs of `order` words in all parts but the first, the
    share that stands in an earlier part too. 0 for a single part.

    Parts that were written without sight of each other, as Skeleton-of-Thought does, may say the same thing. It sees
    the same words only: one thought in other words is missed, and a phrase that has to recur is counted.
    """
    seen: set[tuple[str, ...]] = set()
    repeated = total = 0
    for place, point in enumerate(points):
        words = _words(point)
        runs = [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
        if place:
            total += len(runs)
            repeated += sum(run in seen for run in runs)
        seen.update(runs)
    return repeated / total if total else 0.0


def coverage(question: str, answer: str) -> float:
    """How much of the question the answer takes up: the share of the question's content words whose first six letters
    begin a word of the answer. 1 for a question without content words.

    Function words do not count; six letters stand for a word in its other forms (productive, productivity). It sees
    whether the subject is mentioned, and neither whether what is said about it is right nor whether anything is said
    at all: an answer that repeats the question covers it. Synonyms are missed.
    """
    functional = set(_FUNCTION_WORDS.split())
    wanted = {word[:_STEM] for word in _words(question) if word not in functional and not word.isdecimal()}
    found = {word[:_STEM] for word in _words(answer)}
    return len(wanted & found) / len(wanted) if wanted else 1.0


def common_prefix(tokens: Sequence[int], plain: Sequence[int]) -> int:
    """How many tokens two answers share from the beginning. They are identical if this is the length of both."""
    length = 0
    for a, b in zip(tokens, plain, strict=False):
        if a != b:
            break
        length += 1
    return length


def exact_match(answer: str, reference: str) -> bool:
    """Whether the two are the same but for case, spaces, and punctuation or Markdown around them."""

    def bare(text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!?\"'`*_()[]«»“”‘’")

    return bare(answer) == bare(reference)


def contains(answer: str, reference: str) -> bool:
    """Whether the reference's words stand in the answer one after another."""
    words, wanted = _words(answer), _words(reference)
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 (Lin 2004): the harmonic mean of the shares of both texts that their longest common subsequence
    of words makes up."""
    a, b = _words(answer), _words(reference)
    return 2 * _longest_common_subsequence(a, b) / (len(a) + len(b)) if a and b else 0.0


def chrf(answer: str, reference: str, *, order: int = 6, beta: float = 2.0) -> float:
    """chrF (Popović 2015): F-score over character n-grams of length 1 to `order`, with recall weighing `beta` times
    as much as precision. Spaces do not count; precision and recall are averaged over the orders that both texts
    are long enough for."""
    a, b = "".join(answer.split()), "".join(reference.split())
    orders = range(1, min(order, len(a), len(b)) + 1)
    precision = recall = 0.0
    for n in orders:
        ours = Counter(a[i : i + n] for i in range(len(a) - n + 1))
        theirs = Counter(b[i : i + n] for i in range(len(b) - n + 1))
        shared = (ours & theirs).total()
        precision += shared / ours.total() / len(orders)
        recall += shared / theirs.total() / len(orders)
    if precision + recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def numeric_match(answer: str, reference: str) -> bool:
    """Whether the answer's result is the reference's number.

    The result is the first number after the last `\\boxed{` or `####`, or else the last number in the text. Both may
    be written with thousands separators (1,234), as fractions (3/4, 1 1/2, ½, \\frac{3}{4}), powers (2.5e6,
    2.5 × 10^6), percentages or amounts of money. A percent sign on one side only may be a matter of notation or
    part of the value: 25% matches both 25 and 0.25. If the reference has decimals, the answer may have more of them;
    a reference that is a fraction may be answered with two decimals or more. A reference without a number matches
    nothing.
    """
    wanted, found = _result(reference), _result(answer)
    if wanted is None or found is None:
        return False
    candidates = {found.value}
    if found.percent != wanted.percent:
        candidates.add(found.value / 100 if found.percent else found.value * 100)
    return any(abs(value - wanted.value) <= wanted.tolerance for value in candidates)


def has_number(text: str) -> bool:
    """Whether there is a number in the text that `numeric_match` can read."""
    return _result(text) is not None


_STEM = 6
_FUNCTION_WORDS = """
a about an and any are as at be been but by can could did do does each for from give had has have her him
his how i if in into is it its list may me might more most my no not of on or other our please shall she
should so some such tell than that the their them then there these they this those to us was we were what
when where which who whom whose why will with would you your
"""

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")


def _words(text: str) -> list[str]:
    """Letters and digits in a row are a word, and so is every character of scripts that do not use spaces."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, by the bit-parallel recurrence of Hyyrö (2004): one integer holds a row of the usual table."""
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        match = row & positions.get(word, 0)
        row = (row + match | row - match) & every
    return len(a) - row.bit_count()


@dataclass(frozen=True)
class _Number:
    """A number as it was written: its value before the percent sign, and how far off still counts as equal."""

    value: Fraction
    percent: bool
    tolerance: Fraction


# Limits keep a model that babbles digits from making us compute with thousands of them.
_INTEGER = r"(?:\d{1,3}(?:[,\u00a0\u2009\u202f]\d{3})+|\d{1,40})(?!\d)"
_NUMBER = re.compile(
    rf"""
    (?<![a-z\d^]) (?<!\d[.]) (?<!\^[{{])  # not the 2 of CO2, cm^2, x^{{2}} or of version 1.2.2
    (?P<sign> (?<!\)) [-−] )?
    (?: [$€£¥] \s? )?
    (?P<value> {_INTEGER}(?:[.]\d+)? | [.]\d+ )
    (?: e(?P<e>[+-]?\d{{1,3}})\b
      | \s? [×x*·] \s? 10 \^[{{]?(?P<ten>[-−+]?\d{{1,3}})
      | \^[{{]?(?P<power>[-−]?\d{{1,2}})\b
      | \s?/\s?(?P<denominator>0*[1-9]\d{{0,39}})\b(?![.]\d)
      | [ ](?P<part>\d{{1,3}})/(?P<parts>0*[1-9]\d{{0,2}})\b
    )?
    (?: \s? (?P<scale> thousand | million | billion | trillion )\b )?
    (?P<percent> \s?% | \s(?:percent|per\ cent)\b )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RESULT_MARK = re.compile(r"\\boxed\s*\{|####")


def _result(text: str) -> _Number | None:
    """The number that a text ends up with, see `numeric_match`."""
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda m: "^" + m[0].translate(_SUPERSCRIPTS), text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    text = re.sub(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ",", text).replace("\\times", "×").replace("\\cdot", "·")
    text = re.sub(r"\\[,;! ]|\\(?=[$%])", "", text)
    marks = list(_RESULT_MARK.finditer(text))
    if marks and (first := _NUMBER.search(text, marks[-1].end())):
        return _number(first)
    matches = list(_NUMBER.finditer(text))
    return _number(matches[-1]) if matches else None


def _number(match: re.Match[str]) -> _Number:
    whole, _, decimals = match["value"].partition(".")
    decimals = decimals[:40]
    digits = "".join(c for c in whole if c.isdigit())
    value = Fraction(f"{digits or 0}.{decimals or 0}")
    tolerance = Fraction(1, 2 * 10 ** len(decimals)) if decimals else Fraction(0)
    factor = Fraction(_SCALES[match["scale"].lower()]) if match["scale"] else Fraction(1)
    if exponent := match["e"] or match["ten"]:
        factor *= Fraction(10) ** int(exponent.replace("−", "-"))
    if match["power"] and value:
        value **= int(match["power"].replace("−", "-"))
    if match["denominator"] or match["parts"]:
        if match["denominator"]:
            value /= int(match["denominator"])
        else:
            value += Fraction(int(match["part"]), int(match["parts"]))
        tolerance = min(Fraction(1, 200), value / 20)  # 1/400 is not 0
    if match["sign"]:
        value = -value
    return _Number(value * factor, bool(match["percent"]), tolerance * factor)
