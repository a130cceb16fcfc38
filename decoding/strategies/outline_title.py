"""What stands after a point's number: its title, its explanation, and the points it needs."""

from __future__ import annotations

import re

# A title is asked for in 3 to 5 words. Up to this length it is taken as it is, even "Diet: eat more plants";
# beyond, it is cut before its explanation; and what is still long after that is cut at the second limit. While it is
# being written it can be ended, and is at the first.
_SHORT, _LONG = 6, 15
_JOINTS = re.compile(
    r"and|or|but|nor|so|as|than|that|which|who|whose|where|when|while|because|if|to|of|in|on|at|by|for|from|with|into|"
    r"through|about|over|under|between|without|during|throughout|instead|such|like|using|including|is|are",
    re.IGNORECASE,
)
"""Words that begin something more: a title that is ended ends before one."""

_NUMBERS = (
    r"(?:(?:points?|steps?|items?|nos?\.?)\s*)?#?\d{1,2}"
    r"(?:\s*(?:,\s*and|,|、|，|and|&|\+|-|–|to|和|と)\s*(?:(?:points?|steps?|items?)\s*)?#?\d{1,2})*"
)
_NEED = (
    r"(?:needs?|depends?\s+on|dependent\s+on|dependency|dependencies|requires?|builds?\s+on|based\s+on|after"
    r"|需要|依赖|基于)\s*[:：]?"
)
_NOTHING = r"(?:none|nothing|no\s+points?|n/a|-|—|无)"
_LIST = rf"(?P<numbers>{_NUMBERS}|{_NOTHING})"
_NEEDS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\s*[(\[{{（【]\s*{_NEED}\s*{_LIST}\s*[)\]}}）】]",
        rf"\s*(?:[,;:–—|-]|->|→)\s*{_NEED}\s*{_LIST}\s*\.?\s*$",
        rf"\s*(?:->|→|←|<-)\s*(?P<numbers>{_NUMBERS})\s*\.?\s*$",
        rf"\s*\[\s*(?P<numbers>(?:{_NUMBERS})?)\s*\]\s*\.?\s*$",
    )
)


def split_needs(text: str) -> tuple[str, list[int]]:
    """Separates "Compare both (needs 1, 2)" into its text and [1, 2]; also "[1, 2]", "→ 1", "depends on 1 and 2"."""
    for pattern in _NEEDS:
        match = pattern.search(text)
        if match:
            return text[: match.start()] + text[match.end() :], _numbers(match["numbers"])
    return text, []


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for first, last in re.findall(r"(\d+)(?:\s*(?:-|–|to)\s*(\d+))?", text):
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


_BOLD = re.compile(r"(\*\*|__)\s*(?P<title>.+?)\s*\1(?P<after>.*)", re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_EXPLANATION = re.compile(r":\s|：|\s[-–—]+\s|——|\s[–—]|[–—]\s")
_SENTENCE = re.compile(r"(?<=\w{3})[.!?;]\s|[。！？；]")  # three letters: not after "vs.", "Dr." or "e.g."
_PAIRS = {('"', '"'), ("'", "'"), ("“", "”"), ("「", "」"), ("[", "]"), ("<", ">")}
_EDGES = " \t\u00a0\u3000*_`:：;；,，、.．。-–—|~"


def trim_title(text: str) -> str:
    """The title in "**Title**: explanation": no markdown, no explanation, no punctuation around it, at most 15 words.

    Empty when no letter or digit is left.
    """
    text = _TAG.sub("", _LINK.sub(r"\1", text)).strip(_EDGES.replace("*", "").replace("_", ""))
    text = re.sub(r"^\[[ xX]\]\s+", "", text)
    bold = _BOLD.match(text)
    if bold and (re.match(r"\s*(?:[:：.(（\[–—-]|$)", bold["after"]) or bold["title"].endswith((":", "："))):
        text = bold["title"]
    text = re.sub(r"\*{1,3}|__|`", "", text).strip()
    for separator in (_EXPLANATION, _SENTENCE):
        if _length(text) <= _SHORT:
            break
        head = separator.split(text, maxsplit=1)[0]
        if re.search(r"\w", head):
            text = head
    if _length(text) > _LONG:
        text = _shorten(text)
    text = text.strip(_EDGES)
    if len(text) > 1 and (text[0], text[-1]) in _PAIRS:
        text = text[1:-1].strip(_EDGES)
    return text if re.search(r"[^\W_]", text) else ""


def overlong(text: str) -> str | None:
    """The title to make of one that is being written, once it is longer than a title should be; None until then.

    What it is called before its explanation begins; or else its first words, up to where a phrase ends if that leaves
    four of them.
    """
    if _length(text) <= _SHORT:  # the word behind these has begun, so that they are whole
        return None
    for separator in (_EXPLANATION, _SENTENCE):
        head = separator.split(text, maxsplit=1)[0]
        if head != text and re.search(r"\w", head):
            return head
    words = text.split()[:_SHORT]
    if len(words) < _SHORT:
        return text[: 2 * _SHORT]  # no spaces between words
    end = next((at for at in range(_SHORT - 1, 3, -1) if _JOINTS.fullmatch(words[at])), _SHORT)
    return " ".join(words[:end])


def _length(text: str) -> float:
    """Length in words; two Chinese, Japanese or Korean characters count as one."""
    wide = len(re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", text))
    return wide / 2 if wide else len(text.split())


def _shorten(text: str) -> str:
    head = re.split(r",\s|，", text, maxsplit=1)[0]
    if 2 <= _length(head) <= _LONG:
        return head
    return " ".join(text.split()[:_LONG])[: 12 * _LONG]
