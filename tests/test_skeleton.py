"""Skeleton-of-Thought on a tiny model whose outlines are dictated; its points, and all forward passes, are its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import decoding
import prompts
from decoding.backends.base import Backend
from decoding.errors import InvalidRequest
from decoding.strategies import Autoregressive, Jacobi, SkeletonOfThought, Speculative, parse
from decoding.strategies.router import Always
from decoding.types import Generation, Message, SamplingParams
from tests.dictation import OUTLINE, OUTLINED, QUESTION, TITLES, Dictated, Typist
from tests.refiners import Slope
from tests.tiny import EOS, tiny_model, tiny_tokenizer

PARAMS = SamplingParams(max_new_tokens=200)


@pytest.fixture(scope="module")
def lm() -> decoding.LocalBackend:
    model = tiny_model("llama", max_position_embeddings=4096)
    backend = decoding.LocalBackend(model, tiny_tokenizer(), name="tiny", eos=[EOS], slots=12, capacity=3072)
    backend.latency = Slope(0)  # type: ignore[assignment]  # a wide step costs what a narrow one does
    return backend


def answer(lm: Backend, params: SamplingParams = PARAMS, question: Any = QUESTION, **options: Any) -> Generation:
    lm.forget()
    on_text = options.pop("on_text", None)
    strategy = SkeletonOfThought(**{"outline": OUTLINED, **options})
    generation: Generation = decoding.generate(question, lm, strategy=strategy, params=params, on_text=on_text)
    return generation


def points(generation: Generation) -> list[Generation]:
    return [part for label, part in generation.parts.items() if label.startswith("point")]


def steps(part: Generation) -> range:
    return range(part.trace[0].step, part.trace[-1].step + 1)


@pytest.mark.parametrize("prompt", ["skeleton", "skeleton/small"])
def test_points_are_begun_while_the_outline_is_written(lm: decoding.LocalBackend, prompt: str) -> None:
    together, apart = (answer(lm, prompt=prompt, pipeline=pipeline, steer=False) for pipeline in (True, False))
    outline, expansions = together.parts["outline"], points(together)
    written = [step.step for step in outline.trace if step.committed]  # one byte each
    for title, expansion in zip(TITLES, expansions, strict=True):
        complete = written[OUTLINE.index("\n", OUTLINE.index(title))]
        assert complete < expansion.trace[0].step <= complete + 2
    assert expansions[0].trace[-1].step < written[-1]
    assert any(step.batch_sequences > 1 for step in outline.trace)
    # The two-stage mode is the control: there, nothing begins before the outline has ended.
    last = apart.parts["outline"].trace[-1].step
    assert all(expansion.trace[0].step > last for expansion in points(apart))
    assert len({s.step for s in together.trace}) < len({s.step for s in apart.trace})


@pytest.mark.parametrize("prompt", ["skeleton", "skeleton/small"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_pipelining_changes_no_token(lm: decoding.LocalBackend, prompt: str, temperature: float) -> None:
    params = PARAMS.but(temperature=temperature, seed=5)
    together, apart = (answer(lm, params, prompt=prompt, pipeline=pipeline) for pipeline in (True, False))
    assert together.text == apart.text
    assert {label: part.tokens for label, part in together.parts.items()} == {
        label: part.tokens for label, part in apart.parts.items()
    }
    assert len({tuple(part.tokens) for part in points(together)}) == 4  # the model does say different things


def test_a_point_is_shown_the_outline_as_far_as_itself(lm: decoding.LocalBackend) -> None:
    alone = [
        prompts.render(
            "skeleton/expand",
            question=QUESTION,
            outline=("1." + OUTLINE).split(f"\n{number + 1}.")[0].strip(),
            index=number,
            title=title,
            max_points=5,
        )
        for number, title in enumerate(TITLES, 1)
    ]
    out = answer(lm, prompt="skeleton", repetition_penalty=1)
    for chat, expansion in zip(alone, points(out), strict=True):
        budget = PARAMS.but(max_new_tokens=SkeletonOfThought().budget(0, PARAMS.max_new_tokens))
        plain = decoding.generate(lm.encode(chat.messages, chat.prefill), lm, params=budget)
        assert expansion.tokens == plain.tokens


@pytest.mark.parametrize("prompt", ["skeleton", "skeleton/small"])
@pytest.mark.parametrize("pipeline", [True, False])
def test_points_reuse_what_the_outline_has_read(lm: decoding.LocalBackend, prompt: str, pipeline: bool) -> None:
    out = answer(lm, prompt=prompt, pipeline=pipeline)
    for part in out.parts.values():
        assert part.metrics.prefill_tokens + part.metrics.reused_tokens == part.metrics.prompt_tokens
    computed = sum(part.metrics.prefill_tokens for part in points(out))
    assert 0 < computed <= 0.4 * sum(part.metrics.prompt_tokens for part in points(out))
    assert out.parts["outline"].metrics.reused_tokens == 0


def test_a_steered_outline_is_the_same_in_fewer_passes(lm: decoding.LocalBackend) -> None:
    free, steered = (answer(lm, steer=steer) for steer in (False, True))
    assert free.text == steered.text
    one, other = free.parts["outline"], steered.parts["outline"]
    assert one.text.strip() == other.text.strip() and one.metrics.reused_tokens == other.metrics.reused_tokens == 0
    # Three numbers of two bytes that nobody has to write.
    assert len(other.tokens) == len(one.tokens) - 6
    assert len({step.step for step in other.trace}) == len({step.step for step in one.trace}) - 6

    sentence = " Repair pipes, since they lose more water than people drink in a year\n2. Plant for drought\n"
    ended = answer(lm, outline=Dictated((("2.", " Plant for drought\n"), ("", sentence))), max_points=2)
    assert ended.parts["outline"].text.startswith(" Repair pipes, since they lose more\n2. Plant")
    assert [label for label in ended.parts if label.startswith("point")] == ["point 1", "point 2"]


@pytest.mark.parametrize("expand", ["speculative(draft_length=4)", "jacobi(block_size=4)", "lookahead(adaptive=false)"])
def test_stages_have_strategies_of_their_own(lm: decoding.LocalBackend, expand: str) -> None:
    plain, fast = answer(lm), answer(lm, expand=expand)
    assert fast.text == plain.text and fast.tokens == plain.tokens
    assert fast.metrics.drafted > 0 and fast.parts["outline"].metrics.drafted == 0
    both = SkeletonOfThought(inner=Jacobi(), outline="speculative(drafter=prompt-lookup)")
    assert both.stage("outline") == Speculative(drafter="prompt-lookup") and both.stage("expand") == Jacobi()


def dictated(*texts: tuple[str, str]) -> Dictated:
    return Dictated(tuple((f"**{title}:**", text) for title, text in texts))


def test_a_stream_is_in_order_and_as_early_as_it_can_be(lm: decoding.LocalBackend) -> None:
    expand = dictated(
        (TITLES[0], "Leaks waste a fifth. They are found at night. This takes a while."),
        (TITLES[1], "Thyme needs little."),
        (TITLES[2], "Price by use: **Price by use:** Who uses more pays more. And then half a sentence"),
        (TITLES[3], "Teachers know how.\n5. And so on"),
    )
    pieces: list[tuple[int, str]] = []

    def listen(piece: str) -> None:
        pieces.append((lm.engine.number, piece))

    out = answer(lm, PARAMS.but(max_new_tokens=600), expand=expand, point_tokens=72, on_text=listen)
    assert "".join(piece for _, piece in pieces) == out.text == (
        "1. **Repair pipes**: Leaks waste a fifth. They are found at night. This takes a while.\n\n"
        "2. **Plant for drought**: Thyme needs little.\n\n"
        "3. **Price by use**: Who uses more pays more.\n\n"
        "4. **Teach children**: Teachers know how."
    )  # fmt: skip
    first = next(step for step, piece in pieces if "a fifth." in piece)
    assert first < out.parts["point 1"].trace[-1].step - 20  # long before the point was complete
    second = next(step for step, piece in pieces if "Thyme" in piece)
    assert second >= out.parts["point 1"].trace[-1].step > out.parts["point 2"].trace[-1].step  # it had to wait


def test_a_listener_that_has_heard_enough_ends_all_points(lm: decoding.LocalBackend) -> None:
    heard: list[str] = []

    def listen(piece: str) -> bool:
        heard.append(piece)
        return True

    out = answer(lm, on_text=listen)
    assert len(heard) == 1 and out.text == heard[0] and out.finish_reason == "stop"
    assert out.metrics.new_tokens < 200 and not lm.engine.busy


@pytest.mark.parametrize("outline", ["There is no list here.", " Only this\n", ""])
def test_without_a_list_the_answer_is_plain(lm: decoding.LocalBackend, outline: str) -> None:
    plain = decoding.generate(QUESTION, lm, params=PARAMS)
    pieces: list[str] = []
    out = answer(lm, outline=Dictated((("", outline),)), on_text=pieces.append)
    assert out.text == plain.text == "".join(pieces)
    assert out.parts["answer"].tokens == plain.tokens and out.finish_reason == plain.finish_reason
    if "point 1" in out.parts:  # it was begun before the outline ended, and its cost is not hidden
        assert len(out.parts["point 1"].tokens) <= len(outline) and out.parts["point 1"].trace[0] in out.trace
    assert not lm.engine.busy


NEEDS = " Trains\n2. Planes\n3. Compare both (needs 1, 2)\n4. Choose (needs 3, 5)\n5. Boats (needs 4)\n"


def test_points_wait_for_those_they_need_and_see_their_texts(lm: decoding.LocalBackend) -> None:
    expand = Dictated(
        (
            ("Compare both: Both are loud.", "So choose boats."),
            ("Trains: Rails sing at dawn.\nPlanes: Wings hum.", "Both are loud."),
            ("**Trains:**", "Rails sing at dawn."),
            ("**Planes:**", "Wings hum."),
            ("Choose: So choose boats.", "They float."),
        )
    )
    for pipeline in (True, False):
        out = answer(lm, outline=Dictated((("", NEEDS),)), expand=expand, dependencies=True, pipeline=pipeline)
        assert out.error is None
        assert [part.text for part in points(out)] == [
            "Rails sing at dawn.", "Wings hum.", "Both are loud.", "So choose boats.", "They float.",
        ]  # fmt: skip
        trains, planes, compare, choose, boats = map(steps, points(out))
        assert set(trains) & set(planes)  # one wave
        # 4 needs 5 and 5 needs 4: the one that comes first goes ahead.
        assert max(trains[-1], planes[-1]) < compare[0] and compare[-1] < choose[0] and choose[-1] < boats[0]
    asked = prompts.render("skeleton/small/outline", question=QUESTION, dependencies=True).messages
    assert any("(needs 2)" in message["content"] for message in asked)


def test_without_needs_dependencies_change_nothing(lm: decoding.LocalBackend) -> None:
    begun = []
    for out in (answer(lm), answer(lm, dependencies=True)):
        written = next(step.step for step in out.parts["outline"].trace if step.committed)
        begun.append([part.trace[0].step - written for part in points(out)])
    assert begun[0] == begun[1] and len(begun[0]) == 4


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_failed_point_is_marked_and_the_others_are_kept(lm: decoding.LocalBackend, pipeline: bool) -> None:
    texts = [(title, f"All about it, {title}.") for title in TITLES]
    texts[1] = (TITLES[1], "!")
    out = answer(lm, PARAMS.but(max_new_tokens=400), expand=dictated(*texts), pipeline=pipeline)
    assert out.finish_reason == "error" and out.error == "point 2: RuntimeError: dictation ran dry"
    assert [part.error is None for part in points(out)] == [True, False, True, True]
    assert "2. **Plant for drought**\n\n3. **Price by use**: All about it, Price by use." in out.text
    assert answer(lm).error is None


def test_a_point_whose_prompt_does_not_fit_fails_alone(lm: decoding.LocalBackend) -> None:
    chat = prompts.render("skeleton/outline", question=QUESTION, max_points=6)
    capacity = len(lm.encode(chat.messages, chat.prefill)) + 480
    small = decoding.LocalBackend(lm.model, lm.tokenizer, name="tiny", eos=[EOS], capacity=capacity)
    small.latency = lm.latency
    long = " Repair pipes\n2. " + "x" * 150 + "\n3. Price by use\n"  # a prompt holds the title three times
    out = answer(small, outline=Dictated((("", long),)), outline_tokens=400, prompt="skeleton")
    assert out.error is not None and out.error.startswith("point 2: ContextOverflow")
    assert [part.error is None for part in points(out)] == [True, False, True]


def test_an_outline_that_fails_leaves_the_points_it_had(lm: decoding.LocalBackend) -> None:
    class Breaks(Dictated):
        """Fails once the outline has three lines."""

        def decoder(self, backend: decoding.LocalBackend) -> decoding.Decoder:
            whole = super().decoder(backend)
            commit = whole.commit

            def breaking(sequences: Any, output: Any) -> Any:
                if any(bytes(s.new_tokens).count(b"\n") == 3 for s in sequences):
                    raise RuntimeError("out of ink")
                return commit(sequences, output)

            whole.commit = breaking  # type: ignore[method-assign]
            return whole

    out = answer(lm, outline=Breaks((("", OUTLINE),)), steer=False)
    assert out.error == "outline: RuntimeError: out of ink" and out.finish_reason == "error"
    assert len(points(out)) == 3 and "3. **Price by use**" in out.text


def test_earlier_turns_are_part_of_every_prompt(lm: decoding.LocalBackend) -> None:
    talk: list[Message] = [
        {"role": "system", "content": "You are a mayor."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": QUESTION},
    ]
    alone, later = answer(lm), answer(lm, question=talk)
    for label in ("outline", "point 1"):
        assert later.parts[label].metrics.prompt_tokens > alone.parts[label].metrics.prompt_tokens + 30
    with pytest.raises(InvalidRequest, match="last is the user's"):
        answer(lm, question=talk[:3])


def test_limits_of_points() -> None:
    assert SkeletonOfThought().budget(0, 1000) == 96
    even = SkeletonOfThought(max_points=4)
    assert [even.budget(place, 200) for place in range(4)] == [50] * 4
    uneven = SkeletonOfThought(max_points=4, point_tokens="96, 48")
    assert uneven == SkeletonOfThought(max_points=4, point_tokens=[96, 48]) == parse(str(uneven))
    assert [uneven.budget(place, 1000) for place in range(4)] == [96, 48, 48, 48]
    assert [uneven.budget(place, 160) for place in range(4)] == [64, 32, 32, 32]
    assert SkeletonOfThought().budget(2, 1) == 1


def test_a_small_budget_gives_fewer_points_rather_than_shorter_ones() -> None:
    strategy = SkeletonOfThought()
    assert [strategy.points(tokens) for tokens in (1, 128, 160, 256, 640, 4096)] == [3, 3, 4, 6, 8, 8]
    for tokens in (120, 160, 250, 319, 640, 4096):
        assert strategy.budget(0, tokens) >= 40
        assert strategy.points(tokens) * strategy.budget(0, tokens) <= tokens or strategy.budget(0, tokens) == 96
    assert SkeletonOfThought(point_tokens=10).points(80) == 8  # points that are meant to be short
    assert SkeletonOfThought(max_points=2).points(40) == 2


def test_points_are_asked_to_be_as_long_as_they_have_room_for(lm: decoding.LocalBackend) -> None:
    def asked(tokens: int, length: str = "") -> str:
        strategy = SkeletonOfThought(length=length)
        return strategy.length_of(strategy.budget(0, tokens))

    assert [asked(tokens) for tokens in (60, 160, 500, 640)] == [
        "one sentence", "one or two sentences", "two or three sentences", "three or four sentences",
    ]  # fmt: skip
    assert asked(640, length="two lines") == "two lines"
    for prompt in ("skeleton", "skeleton/small"):
        room = answer(lm, PARAMS.but(max_new_tokens=260), prompt=prompt, point_tokens=62, max_points=4)
        short = answer(lm, PARAMS.but(max_new_tokens=260), prompt=prompt, point_tokens=42, max_points=4)
        longer = room.parts["point 1"].metrics.prompt_tokens - short.parts["point 1"].metrics.prompt_tokens
        assert longer >= len("two or three sentences") - len("one or two sentences")


@pytest.mark.parametrize(("slope", "together"), [(0.0, 4), (1.0, 1)])
def test_as_many_points_at_once_as_raise_the_tokens_per_second(
    lm: decoding.LocalBackend, monkeypatch: pytest.MonkeyPatch, slope: float, together: int
) -> None:
    monkeypatch.setattr(lm, "latency", Slope(slope))
    out, free = answer(lm, pipeline=False), answer(lm, at_once=4, pipeline=False)
    assert most_at_once(out) == together and most_at_once(free) == 4
    assert out.text == free.text  # when points are written changes none of them
    assert most_at_once(answer(lm, at_once=2, pipeline=False)) == 2


def most_at_once(generation: Generation) -> int:
    """How many points were in one step, at most."""
    spans = [steps(part) for part in points(generation)]
    return max(sum(step in span for span in spans) for step in range(spans[-1][-1] + 1))


def test_how_many_at_once_follows_the_curve_of_costs(
    lm: decoding.LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(cost: Any, most: int = 8) -> int:
        monkeypatch.setattr(lm, "latency", SimpleNamespace(cost=lambda tokens, sequences, context: cost(tokens)))
        return lm.at_once(QUESTION, Autoregressive(), most)

    assert at_once(lambda n: np.ones_like(n, dtype=float)) == 8  # free: all of them
    assert at_once(lambda n: n.astype(float)) == 1  # no slack: one after the other
    assert at_once(lambda n: np.maximum(n, 3.0)) == 3  # slack up to three tokens
    assert at_once(lambda n: np.maximum(n, 30.0), most=5) == 5
    monkeypatch.delattr(lm, "latency")
    monkeypatch.setattr(type(lm.engine.cache), "free", 0)
    assert lm.at_once(QUESTION, Autoregressive(), 5) == 5  # no slot to measure in
    assert Typist(lambda _: "").at_once(QUESTION, Autoregressive(), 7) == 7


def test_points_that_wait_for_others_do_not_wait_for_a_place(lm: decoding.LocalBackend) -> None:
    out = answer(lm, outline=Dictated((("", NEEDS),)), dependencies=True, at_once=1)
    assert out.error is None and len(points(out)) == 5 and most_at_once(out) == 1


def test_limits_and_lengths_reach_the_points(lm: decoding.LocalBackend) -> None:
    out = answer(lm, PARAMS.but(max_new_tokens=600), point_tokens="20, 10, 5", length="about 40 words")
    assert [len(part.tokens) for part in points(out)] == [20, 10, 5, 5]
    plain = answer(lm, PARAMS.but(max_new_tokens=600), point_tokens="20, 10, 5")
    # Said twice: in the worked example, and of the point.
    grown = out.parts["point 1"].metrics.prompt_tokens - plain.parts["point 1"].metrics.prompt_tokens
    assert grown == 2 * (len("about 40 words") - len("one sentence"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outline": "skeleton"}, "outline must be a token-level strategy"),
        ({"expand": 3}, "expand must be a token-level strategy"),
        ({"pipeline": 1}, "pipeline must be true or false"),
        ({"dependencies": "yes"}, "dependencies must be true or false"),
        ({"point_tokens": 0}, "point_tokens must be one integer"),
        ({"point_tokens": "many"}, "point_tokens must be one integer"),
        ({"point_tokens": []}, "point_tokens must be one integer"),
        ({"at_once": -1}, "at_once must be an integer of at least 0"),
        ({"max_points": True}, "max_points must be an integer"),
        ({"router": "sometimes"}, "unknown router 'sometimes'"),
        ({"router": "prompt(threshold=2)"}, "between 0 and 1"),
        ({"router": "classifier(heads=x)"}, "did you mean 'head'"),
        ({"router": 5}, "router must be"),
        ({"templates": "/nope"}, "no folder of prompt templates at '/nope'"),
        ({"prompt": "nope"}, "unknown prompt template 'nope/outline'"),
        ({"router": "prompt(prompt=nope)"}, "unknown prompt template 'nope'"),
    ],
)
def test_bad_options_get_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        SkeletonOfThought(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["skeleton/small/outline", "skeleton/expand", "router/route"])
@pytest.mark.parametrize("place", ["{{ topic }}", "{% if not can_prefill %}{{ topic }}{% endif %}"])
def test_a_template_that_does_not_work_is_refused_before_anything_is_asked(
    name: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / f"{name}.j2").write_text(f'{{% message "user" %}}{{{{ question }}}}{place}{{% endmessage %}}')
    with pytest.raises(InvalidRequest, match=rf"{name}.j2, line 1: '.*' is undefined"):
        SkeletonOfThought(templates=str(tmp_path), router="prompt")
    if name == "router/route":  # which nobody asks with
        assert SkeletonOfThought(templates=str(tmp_path)).router == Always()


def test_the_text_form_names_stages_and_router() -> None:
    text = "skeleton(outline=speculative(draft_length=3), expand=jacobi, pipeline=false, router=prompt(threshold=0.4))"
    assert str(parse(text)) == text and parse(str(parse(text))) == parse(text)
    assert str(SkeletonOfThought(router=str.isupper)) == "skeleton(router=str.isupper)"


def test_on_a_server_points_are_asked_for_while_the_outline_streams() -> None:
    def reply(asked: str) -> str:
        if "give only its outline" in asked:
            return "1. Repair pipes\n2. Plant for drought\n3. Price by use\n4. Teach children"
        return f"All about it. It takes a few words to say: {asked.rsplit('. ', 1)[1]}."

    lm = Typist(reply)
    pieces: list[str] = []
    out = answer(lm, outline=Autoregressive(), on_text=pieces.append)
    assert out.error is None and "".join(pieces) == out.text
    assert [line[0] for line in lm.log[:3]] == [">", ">", ">"]  # two points were asked for before anything had ended
    assert all(f"to say: {title}." in out.text for title in TITLES)
    lm.log.clear()
    apart = answer(lm, outline=Autoregressive(), pipeline=False)
    assert apart.text == out.text and [line[0] for line in lm.log[:3]] == [">", "<", ">"]
