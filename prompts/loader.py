"""Finds a template, runs it in a sandbox, and collects the messages it wrote."""

from __future__ import annotations

import traceback
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from jinja2 import (
    ChoiceLoader,
    FileSystemLoader,
    PrefixLoader,
    StrictUndefined,
    TemplateNotFound,
    TemplateSyntaxError,
    nodes,
)
from jinja2.exceptions import TemplateRuntimeError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from decoding.errors import InvalidRequest, UnknownName
from decoding.types import Message

_SHIPPED = Path(__file__).parent
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatPrompt:
    """What a model is asked: chat messages, and the text its answer is made to start with ("" for a free start)."""

    messages: list[Message] = field(default_factory=list)
    prefill: str = ""


def render(name: str, *, folder: str | Path | None = None, **values: object) -> ChatPrompt:
    """The prompt that the template `name` ("skeleton/outline") makes of `values`.

    folder: a folder of templates that go before the shipped ones.

    Raises `UnknownName` if there is no such template, and `InvalidRequest`, with the file and the line, if it is
    not well formed, lacks a value, or does what the sandbox forbids.
    """
    environment = _environment(_folders(folder))
    token = _collected.set(_Collected())
    try:
        template = environment.get_template(f"{name}.j2")
        outside = template.render(values).strip()
        if outside:
            raise TemplateRuntimeError(f"the text {outside[:40]!r} stands outside of any message")
        if not _collected.get().messages:
            raise TemplateRuntimeError("it writes no message")
        return ChatPrompt(_collected.get().messages, _collected.get().prefill)
    except TemplateNotFound as error:
        if error.name == f"{name}.j2":
            raise UnknownName("prompt template", name, names(folder)) from None
        raise InvalidRequest(_explain(name, error, f"there is no template {error.name!r}")) from error
    except Exception as error:  # a template can fail like any program
        raise InvalidRequest(_explain(name, error, str(error) or type(error).__name__)) from error
    finally:
        _collected.reset(token)


def names(folder: str | Path | None = None) -> list[str]:
    """The names that `render` knows, in alphabetical order."""
    found = _environment(_folders(folder)).list_templates(["j2"])
    return sorted(name.removesuffix(".j2") for name in found if not name.startswith("shipped/"))


def _folders(folder: str | Path | None) -> tuple[Path, ...]:
    if folder is None:
        return (_SHIPPED,)
    if not Path(folder).is_dir():
        raise InvalidRequest(f"there is no folder of prompt templates at {str(folder)!r}.")
    return (Path(folder), _SHIPPED)


def _explain(name: str, error: Exception, what: str) -> str:
    place = f"prompt template {name!r}"
    if isinstance(error, TemplateSyntaxError):
        place = f"{error.filename}, line {error.lineno}"
    else:
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".j2")]
        if lines:
            place = f"{lines[-1].filename}, line {lines[-1].lineno}"
    sentence = what.strip().rstrip(".").replace(". ", "; ")
    return f"{place}: {sentence}."


@dataclass
class _Collected:
    messages: list[Message] = field(default_factory=list)
    prefill: str = ""


_collected: ContextVar[_Collected] = ContextVar("messages of the template that is running")


class _ChatTags(Extension):
    """The tags `message` and `prefill`, which hand over their text instead of printing it."""

    tags = {"message", "prefill"}  # noqa: RUF012 — declared as an instance variable by its base

    def parse(self, parser: Parser) -> nodes.Node:
        tag = next(parser.stream)
        role = parser.parse_expression() if tag.value == "message" else nodes.Const("prefill")
        body = parser.parse_statements((f"name:end{tag.value}",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_collect", [role]), [], [], body).set_lineno(tag.lineno)

    def _collect(self, role: str, caller: Macro) -> str:
        text = str(caller()).strip()
        collected = _collected.get()
        if collected.prefill:
            raise TemplateRuntimeError("the prefill must come last, and only once")
        if role == "prefill":
            collected.prefill = text
        elif role in _ROLES:
            collected.messages.append(Message(role=role, content=text))
        else:
            raise TemplateRuntimeError(f"a message has the role {' or '.join(_ROLES)}, not {role!r}")
        return ""


@lru_cache(maxsize=16)
def _environment(folders: tuple[Path, ...]) -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        # Under "shipped/", a template that replaces a shipped one can still reach it.
        loader=ChoiceLoader([FileSystemLoader(folders), PrefixLoader({"shipped": FileSystemLoader(_SHIPPED)})]),
        undefined=StrictUndefined,
        extensions=[_ChatTags],
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # prompts are plain text
    )
