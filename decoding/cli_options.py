"""Options that commands share, made from the fields of the dataclasses that they fill."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from decoding.errors import InvalidRequest
from decoding.models import DEFAULT_MODEL
from decoding.options import LoadOptions, Schedule
from decoding.types import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from decoding.backends.base import Backend

SAMPLING = {
    "max_new_tokens": "at most so many",
    "min_new_tokens": "at least so many",
    "temperature": "0 is greedy",
    "top_k": "only the k most likely tokens; 0 is all",
    "top_p": "only the most likely tokens that make up this probability",
    "min_p": "only tokens this likely, against the most likely one",
    "repetition_penalty": "divides the logits of tokens that were there before",
    "seed": "of this request's random numbers",
}
"""Fields of `SamplingParams` that every command offers, and what they do."""


def model_options(parser: argparse.ArgumentParser) -> None:
    """--model, and everything in `LoadOptions`."""
    for title in ("model", "server"):
        group = parser.add_argument_group(title)
        if title == "model":
            text = "alias, folder, .gguf file or hub id (%(default)s)"
            group.add_argument("--model", default=DEFAULT_MODEL, help=text)
        _add(group, LoadOptions, (item for item in fields(LoadOptions) if item.metadata["group"] == title))


def schedule_options(parser: argparse.ArgumentParser) -> None:
    """Everything in `Schedule`."""
    _add(parser.add_argument_group("schedule"), Schedule, fields(Schedule))


def sampling_options(parser: argparse.ArgumentParser) -> None:
    """What commands offer of `SamplingParams`."""
    group = parser.add_argument_group("sampling")
    _add(group, SamplingParams, (item for item in fields(SamplingParams) if item.name in SAMPLING), SAMPLING)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer here; repeatable")


def params_of(options: argparse.Namespace) -> SamplingParams:
    """The sampling parameters that a command line gave. Raises InvalidRequest."""
    return SamplingParams(**_given(SamplingParams, options))


def prompt_of(options: argparse.Namespace) -> str:
    """The prompt that a command line gave: `-` reads standard input. Raises InvalidRequest."""
    if options.prompt != "-":
        return str(options.prompt)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not valid {error.encoding}; give it in this encoding.") from error


def load(options: argparse.Namespace, console: Console) -> Backend:
    """The backend that a command line asked for. Raises InvalidRequest, ModelError or UnknownName."""
    from rich.markup import escape

    how = LoadOptions(**_given(LoadOptions, options))
    with console.status(escape(f"loading {options.model}")):
        return how.load(options.model)


def _given(cls: type[Any], options: argparse.Namespace) -> dict[str, Any]:
    return {item.name: getattr(options, item.name) for item in fields(cls) if hasattr(options, item.name)}


def _add(
    group: argparse._ArgumentGroup,
    cls: type[Any],
    items: Iterable[Field[Any]],
    meanings: Mapping[str, str] | None = None,
) -> None:
    """One option for each field: `warm_up: int = 1` becomes `--warm-up N`."""
    hints = get_type_hints(cls)
    for item in items:
        hint, optional = hints[item.name], False
        if get_origin(hint) in (Union, types.UnionType):
            (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
            optional = True
        meaning = item.metadata["meaning"] if meanings is None else meanings[item.name]
        options: dict[str, Any] = {"default": item.default, "help": meaning}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction if optional else "store_true"
        else:
            options["metavar"] = item.metadata.get("metavar")
            options["type"] = get_args(hint)[0] if get_origin(hint) is tuple else hint
            if get_origin(hint) is tuple:
                options["nargs"] = len(item.metadata["metavar"])
            elif item.default is not None:
                options["help"] += " (%(default)s)"
        group.add_argument(f"--{item.name.replace('_', '-')}", **options)
