"""What a run can be told about its schedule and its model: every option's name, default and meaning, once.

Run files, headers of records (`decoding.config`) and command lines (`decoding.cli_options`) are made from these fields.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from decoding.errors import InvalidRequest

if TYPE_CHECKING:
    from decoding.backends.base import Backend
    from decoding.backends.request import Endpoint

T = TypeVar("T")

DEFAULT_STRATEGIES = ("autoregressive", "speculative", "jacobi", "skeleton")
"""What a comparison compares unless told otherwise."""


def option(default: T, meaning: str, *, metavar: str | tuple[str, ...] | None = None, group: str = "") -> T:
    """A field of a dataclass with its meaning, as a command line's help says it. group: where the help lists it."""
    metadata = {"meaning": meaning, "metavar": metavar, "group": group}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Schedule:
    """In what order and how often answers are made.

    repeats: times each answer is made. streams: questions answered at the same time, in one batch. warm_up:
    short unrecorded answers of each strategy before the first recorded one. cool_down: seconds of rest before each
    recorded turn, for machines that slow down when they get warm.
    """

    repeats: int = option(1, "times every answer is made")
    streams: int = option(1, "questions answered at once")
    warm_up: int = option(1, "unrecorded answers per strategy", metavar="ANSWERS")
    cool_down: float = option(0.0, "rest before each turn", metavar="SECONDS")

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("streams", 1), ("warm_up", 0)):
            if (value := getattr(self, name)) < least:
                raise InvalidRequest(f"{name} must be at least {least}, not {value}.")
        if not (math.isfinite(self.cool_down) and self.cool_down >= 0):
            raise InvalidRequest(f"cool_down must be seconds, 0 or more, not {self.cool_down!r}.")


Group = Literal["model", "server"]


def _local(default: T, meaning: str) -> T:
    return option(default, meaning, group="model")


def _remote(default: T, meaning: str, metavar: str | tuple[str, ...] | None = None) -> T:
    return option(default, meaning, metavar=metavar, group="server")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded (see `decoding.load`), or which server has it (`decoding.OpenAIBackend`).

    slots: sequences in the cache at once. api_key_env: the environment variable that holds the server's key; by
    default OPENAI_API_KEY. endpoint … extra_body: see `decoding.OpenAIBackend`. prices: money per million prompt,
    cached and completion tokens.
    """

    device: str | None = _local(None, "cpu, cuda, cuda:1, mps (a GPU if there is one)")
    dtype: str | None = _local(None, "float32, bfloat16, float16 (float32 on a CPU)")
    weights: str = _local("float32", "float32, or int8 or int4, which a CPU reads faster")
    compile: bool = _local(False, "compile the layers of models that have no fused step")
    device_map: str | None = _local(None, "spread the model over devices, e.g. auto")
    trust_remote_code: bool = _local(False, "run code that a model ships")
    slots: int = _local(32, "sequences held in the cache at once")
    capacity: int | None = _local(None, "tokens per sequence (the context, at most 2048)")
    base_url: str | None = _remote(None, "ask an OpenAI-compatible server for --model instead", "URL")
    api_key_env: str | None = _remote(None, "variable that holds its key (OPENAI_API_KEY)", "VAR")
    endpoint: str = _remote("chat", "chat or completions")
    concurrency: int = _remote(32, "calls under way at once")
    timeout: float = _remote(60.0, "seconds to wait for each event")
    retries: int = _remote(4, "further attempts after a fault")
    prefill: bool | None = _remote(None, "whether it continues a message that was begun for it (found out)")
    warm_prefix: int = _remote(0, "of calls that begin with the same CHARS, one first", "CHARS")
    extra_body: bool = _remote(False, "it takes vLLM's parameters (top_k, min_p, ...)")
    prices: tuple[float, ...] | None = _remote(
        None, "money per million tokens, to tell the cost", ("PROMPT", "CACHED", "COMPLETION")
    )

    def __post_init__(self) -> None:
        for name in ("slots", "capacity"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {value}.")
        if self.prices is not None and len(self.prices) != 3:
            raise InvalidRequest(f"prices are three, of prompt, cached and completion tokens, not {len(self.prices)}.")
        for price in self.prices or ():
            if not (math.isfinite(price) and price >= 0):
                raise InvalidRequest(f"prices must be numbers, 0 or more, not {price!r}.")

    def load(self, model: str) -> Backend:
        """The backend for `model`. Raises InvalidRequest, ModelError or UnknownName."""
        if self.base_url is not None:
            return self._server(model, self.base_url)
        for name in self._given("server"):
            raise InvalidRequest(f"{name} is about a server; say which with base_url, or leave it out.")
        from decoding.api import load

        return load(model, **{name: getattr(self, name) for name in self._names("model")})

    def _server(self, model: str, base_url: str) -> Backend:
        for name in self._given("model"):
            raise InvalidRequest(f"{name} is about a local model; leave it out with base_url.")
        key = None
        if self.api_key_env is not None and (key := os.environ.get(self.api_key_env)) is None:
            raise InvalidRequest("the environment variable that api_key_env names is not set; export it first.")
        from decoding.backends.openai import OpenAIBackend

        prompt_price, cached_price, completion_price = self.prices or (None, None, None)
        return OpenAIBackend(
            base_url,
            model,
            key,
            endpoint=cast("Endpoint", self.endpoint),  # checked by the backend
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            prefill=self.prefill,
            warm_prefix=self.warm_prefix,
            extra_body=self.extra_body,
            prompt_price=prompt_price,
            cached_price=cached_price,
            completion_price=completion_price,
        )

    @classmethod
    def _names(cls, group: Group) -> list[str]:
        return [item.name for item in fields(cls) if item.metadata["group"] == group]

    def _given(self, group: Group) -> list[str]:
        """The options of a group that are not at their defaults."""
        defaults: dict[str, Any] = {item.name: item.default for item in fields(self)}
        return [name for name in self._names(group) if getattr(self, name) != defaults[name]]
