"""Keep secrets out of everything that is written to disk.

A configuration may name an API key, and a server's error message may quote one. Records are meant to be
shared, so whatever looks like a credential is replaced before it reaches a file. Erring on the side of
masking is right here: a masked value costs a reader a question, a leaked one costs its owner more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
"""Anything that JSON can write."""

MASK = "[masked]"

_SECRET_WORDS = frozenset(
    "apikey key token secret password passwd passphrase auth authorization bearer credential credentials".split()  # noqa: SIM905
)
_HARMLESS = frozenset("eos bos pad unk mask stop sep cls image sort primary cache public".split())  # noqa: SIM905
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")

_NAME = r"(?:[\w-]*[_-])?(?:api[_-]?key|access[_-]?token|auth[_-]?token|secret|password|passwd|credentials?)"
_IN_TEXT = (
    (re.compile(rf"(?i)(\b{_NAME}[\"']?\s*[=:]\s*[\"']?)[^\s,;&)\"']+"), rf"\1{MASK}"),  # api_key=..., "password": ...
    (re.compile(r"(?i)\b(authorization\s*[=:]\s*[\"']?(?:\w+\s+)?|bearer\s+(?=\S{12}))[\w.~+/=-]+"), rf"\1{MASK}"),
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s:@]+:[^/\s@]+@"), rf"\1{MASK}@"),  # https://user:password@host
    (re.compile(r"\b(?:sk|pk|rk|hf|gsk|ghp|gho|github_pat|xox[abp])[-_][\w-]{12,}"), MASK),
    (re.compile(r"\bAKIA[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]+"), MASK),
)


def mask_text(text: str) -> str:
    """`text` with everything that looks like a credential replaced by `MASK`."""
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def mask(value: Json, *, variables: bool = False) -> Json:
    """A copy of `value` without credentials: strings under telling names, after telling flags, or of telling shape.

    variables: mask the names of the environment variables that hold them (`api_key_env`), too.
    """
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, Mapping):
        # JSON has no other names than strings: 7 and "7" must not make two configurations of one.
        return {
            str(n): _mask_whole(item) if _is_secret(str(n), variables) else mask(item, variables=variables)
            for n, item in value.items()
        }
    if isinstance(value, Sequence):
        masked: list[Json] = []
        for item in value:
            before = value[len(masked) - 1] if masked else None
            follows_flag = isinstance(before, str) and before.startswith("-") and _is_secret(before)
            masked.append(_mask_whole(item) if follows_flag else mask(item, variables=variables))
        return masked
    return value


def _is_secret(name: str, variables: bool = False) -> bool:
    """Whether a field or flag of this name holds a credential: `api_key` and `hfToken` do, `eos_token` does not, and
    what `api_key_env` holds is the name of a variable."""
    words = [word.lower() for word in _WORD.findall(name)]
    if words[-1:] == ["env"] and not variables:
        return False
    return bool(_SECRET_WORDS & set(words)) and not _HARMLESS & set(words)


def _mask_whole(value: Json) -> Json:
    """`MASK` for any text below `value`; numbers under such names are counts (`key = 3`), not credentials."""
    if isinstance(value, str):
        return MASK if value else value
    if isinstance(value, Mapping):
        return {str(name): _mask_whole(item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_mask_whole(item) for item in value]
    return value
