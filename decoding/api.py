"""The functions most people call: load a model, generate, stream."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, overload

import torch

from decoding.backends.base import Backend, OnText
from decoding.backends.local import LocalBackend
from decoding.backends.turns import HELD_UP
from decoding.engine.precision import WEIGHTS
from decoding.errors import InvalidRequest, UnknownName
from decoding.models import load_model
from decoding.strategies import Autoregressive, Strategy, parse
from decoding.types import Generation, Message, Prompt, SamplingParams

T = TypeVar("T")

_LEAST_CAPACITY = 16  # tokens; with fewer there is not even room to try the model out


def load(
    name_or_path: str = "smollm2-135m",
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    slots: int = 32,
    capacity: int | None = None,
    weights: str = "float32",
    compile: bool = False,
) -> LocalBackend:
    """Load a model: an alias, a local folder, a .gguf file or a hub id.

    device, dtype: as torch names them; float32 on a CPU by default, the checkpoint's own on a GPU.
    device_map: spread the model over devices with accelerate. slots: sequences held in the cache at once;
    more wait in a queue. capacity: tokens per sequence, by default the context up to 2,048. weights: "float32" (as
    they are), or those of linear layers rounded: "int8" to 8-bit integers, which a CPU reads four times as fast, or
    "int4" to four bits with a scale and a minimum for every 32 columns, which Q4_1 files hold anyway, at half the
    memory. Lossless strategies then equal plain decoding with these weights. compile: have the model's
    layers compiled where steps run them one by one: on a GPU, and on a CPU for models without a fused step. The first
    time this takes up to a minute and a half; the code is kept for the next process. Where it is not possible or would
    take longer, a warning says so and the layers run as they are.

    Raises ModelError, UnknownName for an alias that is nearly right, InvalidRequest for sizes out of range.
    """
    if weights not in WEIGHTS:
        raise UnknownName("kind of weights", weights, WEIGHTS)
    if slots < 1:
        raise InvalidRequest(f"slots must be at least 1, not {slots}.")
    if capacity is not None and capacity < _LEAST_CAPACITY:
        raise InvalidRequest(f"capacity must be at least {_LEAST_CAPACITY} tokens, not {capacity}.")
    loaded = load_model(
        name_or_path, device=device, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )
    return LocalBackend(
        loaded.model,
        loaded.tokenizer,
        name=loaded.name,
        eos=loaded.eos_token_ids,
        slots=slots,
        capacity=capacity,
        masking=loaded.masking,
        weights=weights,
        compile=compile,
    )


def resolve(strategy: Strategy | str) -> Strategy:
    """A strategy from its text form; a strategy stays as it is. Raises InvalidRequest for anything else."""
    if isinstance(strategy, str):
        return parse(strategy)
    if not isinstance(strategy, Strategy):
        raise InvalidRequest(f"a strategy is its name or an object such as Jacobi(), not {strategy!r:.60}.")
    return strategy


@overload
def generate(
    prompts: str,
    lm: Backend,
    *,
    strategy: Strategy | str = ...,
    params: SamplingParams | None = ...,
    on_text: OnText | None = ...,
) -> Generation: ...
@overload
def generate(
    prompts: Sequence[Message] | Sequence[int] | Sequence[Prompt],
    lm: Backend,
    *,
    strategy: Strategy | str = ...,
    params: SamplingParams | Sequence[SamplingParams] | None = ...,
    on_text: OnText | None = ...,
) -> Any: ...
def generate(
    prompts: Prompt | Sequence[Prompt],
    lm: Backend,
    *,
    strategy: Strategy | str = Autoregressive(),
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    on_text: OnText | None = None,
) -> Generation | list[Generation]:
    """Answer one prompt, or several in one batch.

    prompts: text or a list of messages (through the chat template) or token ids; or a list of those, which
    gives a list of generations in the same order. params: for all prompts, or one for each. on_text:
    receives the answer's text piece by piece (single prompts only).

    A request that fails alone has `finish_reason` "error" and the cause in `error`; others are complete.
    Raises InvalidRequest for prompts or parameters that make no sense, before anything runs.
    """
    strategy = resolve(strategy)
    lm.require(strategy)
    single = _is_single(prompts)
    batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]
    for prompt in batch:
        _check_prompt(prompt)
    every = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(batch)
    if len(every) != len(batch):
        raise InvalidRequest(f"{len(batch)} prompts came with {len(every)} sets of parameters; give one for each.")
    for each in every:
        _check_params(each)
    if on_text is not None and not single:
        raise InvalidRequest("on_text follows one answer; give a single prompt.")

    async def answer_all() -> list[Generation]:
        return await asyncio.gather(
            *(strategy.answer(prompt, each, lm, on_text) for prompt, each in zip(batch, every, strict=True))
        )

    generations = run(answer_all())
    return generations[0] if single else generations


def stream(
    prompt: Prompt, lm: Backend, *, strategy: Strategy | str = Autoregressive(), params: SamplingParams | None = None
) -> Generator[str, None, None]:
    """Yield the answer to one prompt piece by piece; joined, the pieces are its text.

    Closing the iterator early cancels the request.
    """
    strategy = resolve(strategy)
    lm.require(strategy)
    params = params or SamplingParams()
    _check_prompt(prompt)
    _check_params(params)
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    async def answer() -> None:
        try:
            await strategy.answer(prompt, params, lm, pieces.put)
        finally:
            pieces.put(None)

    answered, cancel = _elsewhere(answer())
    try:
        while (piece := pieces.get()) is not None:
            yield piece
        answered.result()
    finally:
        cancel()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where an event loop is already running (a notebook, say)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    done, cancel = _elsewhere(work)
    try:
        return done.result()
    finally:
        cancel()


def _elsewhere(work: Coroutine[Any, Any, T]) -> tuple[Future[T], Callable[[], None]]:
    """Run a coroutine in a thread and an event loop of its own. Returns what it will give, and what ends it for good,
    which returns when it has ended."""
    done: Future[T] = Future()
    task: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def watched() -> T:
        task.set_result((asyncio.get_running_loop(), asyncio.ensure_future(work)))
        return await task.result()[1]

    def target() -> None:
        try:
            done.set_result(asyncio.run(watched()))
        except BaseException as error:
            done.set_exception(error)

    def end() -> None:
        loop, running = task.result()
        with contextlib.suppress(RuntimeError):  # the loop may be closed, with nothing left to cancel
            loop.call_soon_threadsafe(running.cancel)
        thread.join()

    context = contextvars.copy_context()
    with contextlib.suppress(RuntimeError):  # no loop here that this one holds up
        context.run(HELD_UP.set, HELD_UP.get() | {asyncio.get_running_loop()})
    thread = threading.Thread(target=context.run, args=(target,), daemon=True)
    thread.start()
    return done, end


def _is_single(prompts: Any) -> bool:
    """Whether this is one prompt: text, messages or token ids, and not a list of such."""
    if isinstance(prompts, str):
        return True
    _check_prompt(prompts)
    if not prompts:
        raise InvalidRequest("there is no prompt; give at least one.")
    return all(isinstance(item, int) for item in prompts) or all(isinstance(item, dict) for item in prompts)


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, Sequence):
        raise InvalidRequest(f"a prompt is text, a list of messages or a list of token ids, not {prompt!r:.60}.")


def _check_params(params: Any) -> None:
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params must be SamplingParams(…), or one for each prompt, not {params!r:.60}.")
