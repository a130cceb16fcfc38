"""The public functions, on a tiny model with a byte tokenizer."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import decoding
from decoding.backends.text import TextStream
from decoding.types import Generation, Message, Prompt
from tests.tiny import EOS, tiny_model, tiny_tokenizer

PARAMS = decoding.SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module")
def lm() -> decoding.LocalBackend:
    return decoding.LocalBackend(tiny_model("llama"), tiny_tokenizer(), name="tiny", eos=[EOS], slots=4, capacity=256)


def test_one_prompt_gives_one_generation_and_a_list_gives_a_list(lm: decoding.LocalBackend) -> None:
    one = decoding.generate("Hello", lm, params=PARAMS)
    assert isinstance(one, Generation)
    ids = lm.encode("Hello")
    messages: list[Message] = [{"role": "user", "content": "Hello"}]
    batch: list[Prompt] = ["Hello", messages, ids]
    for same in (decoding.generate(ids, lm, params=PARAMS), decoding.generate(messages, lm, params=PARAMS)):
        assert same.tokens == one.tokens
    many = decoding.generate(batch, lm, params=PARAMS)
    assert [g.tokens for g in many] == [one.tokens] * 3
    other = decoding.generate(["Hello", "Hello"], lm, params=[PARAMS, PARAMS.but(max_new_tokens=3)])
    assert [len(g.tokens) for g in other][1] == 3


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative", "jacobi"])
def test_streamed_pieces_joined_are_the_text(lm: decoding.LocalBackend, strategy: str) -> None:
    for stop in ((), ("e",), ("\x00never",)):
        params = PARAMS.but(stop=stop, max_new_tokens=60)
        whole = decoding.generate("Tell me", lm, strategy=strategy, params=params)
        assert "".join(decoding.stream("Tell me", lm, strategy=strategy, params=params)) == whole.text


def test_closing_a_stream_cancels_the_request(lm: decoding.LocalBackend) -> None:
    pieces = decoding.stream("Tell me", lm, params=PARAMS.but(max_new_tokens=200))
    next(pieces)
    pieces.close()
    assert not lm.engine.busy and lm.engine.cache.free == 4


def test_calls_from_several_threads_take_turns(lm: decoding.LocalBackend) -> None:
    prompts = [[i, 2, 3, 4] for i in range(5)]
    alone = [decoding.generate(prompt, lm, params=PARAMS).text for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda prompt: decoding.generate(prompt, lm, params=PARAMS).text, prompts))
    assert answers == alone
    pairs = zip_longest(*(decoding.stream(prompt, lm, params=PARAMS) for prompt in prompts[:2]), fillvalue="")
    assert ["".join(pieces) for pieces in zip(*pairs, strict=True)] == alone[:2]
    outside = decoding.stream(prompts[0], lm, params=PARAMS)
    inside = [decoding.generate(prompts[1], lm, params=PARAMS).text for _ in outside]
    assert inside and set(inside) == {alone[1]}


def test_a_call_that_would_wait_for_itself_is_refused(lm: decoding.LocalBackend) -> None:
    calls: list[Callable[[str], Any]] = [
        lambda _: decoding.generate("And then?", lm),
        lambda _: list(decoding.stream("And then?", lm)),
    ]
    for call in calls:
        out = decoding.generate("Tell me", lm, params=PARAMS, on_text=call)
        assert out.finish_reason == "error" and "waits for this call" in str(out.error)
    assert decoding.generate("Tell me", lm, params=PARAMS).error is None


def test_an_interrupted_call_on_a_running_loop_has_ended_when_it_returns(lm: decoding.LocalBackend) -> None:
    """As in a notebook, whose next cell finds the engine free."""

    async def cell() -> None:
        with pytest.MonkeyPatch.context() as patch:

            def interrupted(future: Future[Any]) -> None:
                patch.undo()
                raise KeyboardInterrupt

            patch.setattr(Future, "result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                decoding.generate([1, 2], lm, params=PARAMS.but(max_new_tokens=200))

    asyncio.run(cell())
    assert not lm.engine.busy and lm.engine.cache.free == 4


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(lm: decoding.LocalBackend) -> None:
    plain = decoding.generate("Stop here", lm, params=PARAMS.but(max_new_tokens=80))
    stop = plain.text[5:7]
    cut = decoding.generate("Stop here", lm, params=PARAMS.but(max_new_tokens=80, stop=stop))
    assert cut.finish_reason == "stop" and cut.text == plain.text[: plain.text.index(stop)]
    assert plain.tokens[: len(cut.tokens)] == cut.tokens
    never = decoding.generate("Stop here", lm, params=PARAMS.but(stop="never in there"))
    assert never.finish_reason in ("length", "eos")


def test_metrics_add_up(lm: decoding.LocalBackend) -> None:
    plain = decoding.generate("Count", lm, params=PARAMS.but(ignore_eos=True)).metrics
    assert plain.new_tokens == 24 and plain.forwards == 23
    assert plain.tokens_per_forward == plain.acceptance_length == 1
    quick = decoding.generate("Count", lm, strategy="jacobi", params=PARAMS.but(ignore_eos=True)).metrics
    assert quick.new_tokens == 24 and quick.accepted == 23 - quick.forwards
    assert quick.tokens_per_forward == pytest.approx(23 / quick.forwards)


def test_generate_works_inside_a_running_event_loop(lm: decoding.LocalBackend) -> None:
    async def inside() -> list[int]:
        return decoding.generate("Hello", lm, params=PARAMS).tokens

    assert asyncio.run(inside()) == decoding.generate("Hello", lm, params=PARAMS).tokens


def test_model_generate_still_works_beside_the_engine(lm: decoding.LocalBackend) -> None:
    import torch

    ids = torch.tensor([lm.encode("Hello")])
    theirs = lm.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    assert theirs[0, ids.shape[1] :].tolist() == decoding.generate("Hello", lm, params=PARAMS).tokens


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ([], "at least one"),
        ([[]], "empty"),
        ([{"role": "user"}], "'role' and a 'content'"),
        (7, "a prompt is"),
        (["a", 5], "a prompt is"),
        ("a\udcff", "UTF-8"),
        ([{"role": "user", "content": "a\ud83d"}], "UTF-8"),
        ("long " * 300, "shorten"),
        ([999_999], "vocabulary"),
    ],
)
def test_bad_prompts_are_refused_and_the_next_one_is_served(
    lm: decoding.LocalBackend, prompt: object, message: str
) -> None:
    with pytest.raises(decoding.InvalidRequest, match=message):
        decoding.generate(prompt, lm, params=PARAMS)  # type: ignore[call-overload]
    assert decoding.generate("Hello", lm, params=PARAMS).error is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"stop": None}, "stop"),
        ({"logit_bias": [1, 2]}, "logit_bias"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias"),
    ],
)
def test_bad_parameters_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(decoding.InvalidRequest, match=message):
        decoding.SamplingParams(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": None}, "a strategy is"),
        ({"strategy": decoding.Jacobi}, r"an object such as Jacobi\(\)"),
        ({"params": {"max_new_tokens": 3}}, "params must be SamplingParams"),
        ({"params": [3]}, "params must be SamplingParams"),
    ],
)
def test_arguments_of_other_kinds_are_refused(
    lm: decoding.LocalBackend, options: dict[str, object], message: str
) -> None:
    with pytest.raises(decoding.InvalidRequest, match=message):
        decoding.generate("Hello", lm, **options)  # type: ignore[call-overload]
    with pytest.raises(decoding.InvalidRequest, match=message):
        next(decoding.stream("Hello", lm, **options))  # type: ignore[arg-type]


def test_a_model_needs_a_name() -> None:
    with pytest.raises(decoding.InvalidRequest, match="named by text or a path"):
        decoding.load(None)  # type: ignore[arg-type]


def test_a_strategy_that_the_backend_cannot_run_is_refused_up_front() -> None:
    class TextOnly(decoding.Backend):
        name = "a text server"
        capabilities = frozenset({"text"})

        async def complete(self, *_: object, **__: object) -> Generation:
            raise AssertionError("nothing may run")

    with pytest.raises(decoding.CapabilityError, match="a local model"):
        decoding.generate("Hello", TextOnly(), strategy="speculative")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.text(max_size=40),
    st.lists(st.integers(1, 5), max_size=20),
    st.lists(st.text(min_size=1, max_size=3), max_size=2),
)
def test_text_streams_release_whole_characters_and_never_a_stop_string(
    text: str, cuts: list[int], stop: list[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    expected = min((text[: text.index(s)] for s in stop if s in text), key=len, default=text)
    stream = TextStream(tokenizer, stop)
    released = ""
    for cut in [*cuts, len(tokens)]:
        if not tokens or stream.stopped:
            break
        stream.feed(tokens[:cut])
        tokens = tokens[cut:]
        piece = stream.release()
        assert "\N{REPLACEMENT CHARACTER}" not in piece or "\N{REPLACEMENT CHARACTER}" in text
        released += piece
        assert expected.startswith(released)
    released += stream.finish()
    assert released == stream.text == expected


def test_exports_are_the_documented_ones() -> None:
    for name in decoding.__all__:
        assert inspect.getdoc(getattr(decoding, name)), f"{name} is public and has no docstring"
