"""Values written as text: `name` or `name(option=value, …)`, for command lines, TOML files and records."""

from __future__ import annotations

import re
from dataclasses import Field, fields, is_dataclass
from typing import Any, ClassVar

from decoding.errors import InvalidRequest, UnknownName


class TextForm:
    """Gives a class with a `name` its text form; the options are its fields if it is a dataclass."""

    name: ClassVar[str]

    def __str__(self) -> str:
        """The shortest text that parses back into an equal value."""
        options: list[str] = []
        for option in _options(self):
            value = getattr(self, option.name)
            if value != option.default:
                options.append(f"{option.name}={_to_text(value)}")
        return f"{self.name}({', '.join(options)})" if options else self.name


def _options(of: object) -> list[Field[Any]]:
    return [option for option in fields(of) if option.init] if is_dataclass(of) else []


def build(cls: type[Any], name: str, options: dict[str, str]) -> Any:
    """Construct `cls` from parsed options, with errors that name what is wrong."""
    known = {option.name: option for option in _options(cls)}
    for option in options:
        if option not in known:
            raise UnknownName(f"option of {name}", option, known)
    try:
        return cls(**{option: _value(text, known[option].type) for option, text in options.items()})
    except TypeError as error:
        raise InvalidRequest(f"{name}: {error}") from error


def is_count(value: object, least: int = 1) -> bool:
    """Whether an option's value is an integer of at least `least`; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def parse_call(text: str) -> tuple[str, dict[str, str]]:
    """Split `name(key=value, …)`. Values stay as they are written; `build` knows what they mean."""
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", text, flags=re.DOTALL)
    if match is None:
        raise InvalidRequest(f"{text!r} is not of the form name or name(option=value, …).")
    name, inside = match.group(1), match.group(2)
    options: dict[str, str] = {}
    for part in split_outside(inside or "", ",", text):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InvalidRequest(f"{part.strip()!r} in {text!r} is not of the form option=value.")
        options[key.strip()] = value.strip()
    return name, options


def split_outside(inside: str, at: str, whole: str = "") -> list[str]:
    """Split at a character, outside parentheses and quotes. Raises InvalidRequest if those do not match."""
    parts, depth, quote, start = [], 0, "", 0
    for place, char in enumerate(inside):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
        elif char == at and depth == 0:
            parts.append(inside[start:place])
            start = place + 1
        if depth < 0:
            break
    if depth or quote:
        raise InvalidRequest(f"parentheses or quotes do not match in {whole or inside!r}.")
    parts.append(inside[start:])
    return [part for part in parts if part.strip()]


def _value(text: str, annotation: Any) -> Any:
    """What an option's text means in a field. One that takes text and no number keeps it: 2024 may be a folder."""
    written = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    kinds = {kind.strip() for kind in written.split("|")}
    value = _from_text(text)
    if isinstance(value, str) or "str" not in kinds or kinds & {"int", "float", "bool"}:
        return value
    return None if value is None and "None" in kinds else text


def _from_text(value: str) -> Any:
    """A number, a boolean, None or text; nested calls stay text."""
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def _to_text(value: Any) -> str:
    if isinstance(value, (bool, type(None))):
        return str(value).lower()
    if isinstance(value, str):
        try:
            plain = parse_call(value)[0] and _from_text(value) == value
        except InvalidRequest:
            plain = False
        return value if plain else ('"%s"' if "'" in value else "'%s'") % value
    return str(value)
