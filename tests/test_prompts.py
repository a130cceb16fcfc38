"""Prompt templates: their loader, its errors, and what the two stages of a skeleton share."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import prompts
from decoding.errors import InvalidRequest, UnknownName
from decoding.strategies.outline import parse_outline
from prompts import ChatPrompt

FAMILIES = ("skeleton", "skeleton/small")
QUESTION = "How can a town use less water?"


def outline(family: str, **values: Any) -> ChatPrompt:
    return prompts.render(f"{family}/outline", **({"question": QUESTION} | values))


def expand(family: str, index: int, title: str, **values: Any) -> ChatPrompt:
    known: dict[str, Any] = {
        "question": QUESTION,
        "outline": "1. Repair pipes\n2. Plant for drought\n3. Price by use",
        **values,
    }
    return prompts.render(f"{family}/expand", index=index, title=title, **known)


def as_text(prompt: ChatPrompt) -> str:
    """The prompt as a chat template would write it."""
    turns = "".join(f"<{message['role']}>{message['content']}</>" for message in prompt.messages)
    return f"{turns}<assistant>{prompt.prefill}"


def common_start(a: str, b: str) -> str:
    pairs = zip(a, b, strict=False)
    return "".join(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.j2"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stages_start_the_answers_they_ask_for(family: str) -> None:
    assert outline(family).prefill == "1."
    assert expand(family, 2, "Plant for drought").prefill == "**Plant for drought:**"
    for prompt in (outline(family), expand(family, 2, "Plant for drought")):
        roles = [message["role"] for message in prompt.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_prefill_the_request_asks_for_the_form(family: str) -> None:
    assert outline(family, can_prefill=False).prefill == ""
    assert expand(family, 2, "Plant for drought", can_prefill=False).prefill == ""
    if family == "skeleton":
        assert '"1."' in outline(family, can_prefill=False).messages[-1]["content"]
        assert '"1."' not in outline(family).messages[-1]["content"]


def test_stage_2_goes_on_where_stage_1_stopped() -> None:
    first, second = outline("skeleton"), expand("skeleton", 2, "Plant for drought")
    assert second.messages[: len(first.messages)] == first.messages
    # ... and the outline is what stage 1 answered, so its cache serves too.
    assert as_text(second).startswith(as_text(first))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("values", [{}, {"length": "about 60 words", "min_points": 2, "max_points": 3}])
def test_both_stages_share_everything_up_to_the_question(family: str, values: dict[str, Any]) -> None:
    first, second = as_text(outline(family, **values)), as_text(expand(family, 2, "Plant for drought", **values))
    assert f"<user>{QUESTION}\n\n" in common_start(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_points_differ_in_their_titles_only(family: str) -> None:
    second, third = as_text(expand(family, 2, "Plant for drought")), as_text(expand(family, 3, "Price by use"))
    own = 2 * len("Plant for drought") + len("2. ****:</><assistant>")
    assert len(second) - len(common_start(second, third)) <= own


def test_small_models_read_nothing_but_the_title_for_each_further_point() -> None:
    first, second = as_text(expand("skeleton/small", 1, "Repair pipes")), as_text(expand("skeleton/small", 2, "Save"))
    assert second.removeprefix(common_start(first, second)) == "Save:**"
    # Without a pre-filled beginning, the request has to say which point is meant.
    asked = expand("skeleton/small", 1, "Repair pipes", can_prefill=False).messages[-1]["content"]
    assert asked.endswith("only: Repair pipes")


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_and_limits_reach_the_prompt(family: str) -> None:
    asked = outline(family, min_points=2, max_points=7, title_words="two").messages[-1]["content"]
    assert "2 to 7" in asked and "two words" in asked
    assert "about 60 words" in expand(family, 1, "Repair pipes", length="about 60 words").messages[-1]["content"]


@pytest.mark.parametrize("family", FAMILIES)
def test_parents_are_told_before_the_point(family: str) -> None:
    parents = [{"index": 1, "title": "Repair pipes", "text": "Leaks waste a fifth."}]
    asked = as_text(expand(family, 3, "Price by use", parents=parents))
    assert asked.index("Leaks waste a fifth.") < asked.rindex("Price by use")
    assert "Already written" not in as_text(expand(family, 3, "Price by use"))


def test_dependencies_are_asked_for_in_the_form_that_the_parser_reads() -> None:
    asked = outline("skeleton", dependencies=True).messages[-1]["content"]
    example = asked[asked.index('"4. ') + 1 :].split('"')[0]
    assert parse_outline(f"1. a\n2. b\n3. c\n{example}")[-1].needs == (2, 3)
    assert "needs" not in outline("skeleton").messages[-1]["content"]


@pytest.mark.parametrize("family", FAMILIES)
def test_earlier_turns_of_a_conversation_come_before_the_question(family: str) -> None:
    history = [
        {"role": "system", "content": "You are a mayor."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
    ]
    for prompt in (outline(family, history=history), expand(family, 1, "Repair pipes", history=history)):
        assert prompt.messages[0] == history[0]
        assert [message["role"] for message in prompt.messages].count("system") == 1
        start = prompt.messages.index({"role": "user", "content": "Hello"})
        assert prompt.messages[start + 1] == history[2]
        assert prompt.messages[start + 2]["content"].startswith(QUESTION)


def test_the_worked_examples_are_outlines_of_usable_points() -> None:
    examples = [message["content"] for message in outline("skeleton/small").messages if message["role"] == "assistant"]
    assert [len(parse_outline(example)) for example in examples] == [0, 8]
    fewer = outline("skeleton/small", max_points=4).messages
    assert [len(parse_outline(m["content"])) for m in fewer if m["role"] == "assistant"] == [0, 4]
    assert "3 to 4 points" in fewer[-1]["content"]
    assert "list of 3 points" in outline("skeleton/small", max_points=3).messages[-1]["content"]


def test_the_worked_point_is_as_long_as_points_may_be() -> None:
    worked = [outline("skeleton/small", sentences=count).messages[1]["content"] for count in (1, 2, 3, 4)]
    assert [text.count(". ") + 1 for text in worked] == [1, 2, 3, 4]
    assert outline("skeleton/small").messages[1]["content"] == worked[1]


def test_needs_stand_in_the_worked_outlines_only_if_they_are_asked_for() -> None:
    for asked in (False, True):
        texts = [
            m["content"] for m in outline("skeleton/small", dependencies=asked).messages if m["role"] == "assistant"
        ]
        needs = [point.needs for text in texts for point in parse_outline(text) if point.needs]
        assert needs == ([(2,), (3,)] if asked else [])


@pytest.mark.parametrize("question", ["{{ 7 * 7 }} {% raw %}", "<b>&amp;</b>", "多言語？", "a\n\nb", '{"a": [1]}'])
def test_a_question_is_text_whatever_it_says(question: str) -> None:
    assert question in outline("skeleton", question=question).messages[-1]["content"]


def test_a_folder_of_templates_goes_before_the_shipped_ones(tmp_path: Path) -> None:
    write(
        tmp_path,
        "skeleton/outline",
        '{% message "user" %}Plan: {{ question }}{% endmessage %}{% block answer %}{% endblock %}',
    )
    mine = outline("skeleton", folder=tmp_path)
    assert mine == ChatPrompt([{"role": "user", "content": f"Plan: {QUESTION}"}])
    # What is not replaced stays, and builds on what is.
    second = expand("skeleton", 1, "Repair pipes", folder=tmp_path)
    assert second.messages[0] == mine.messages[0]
    assert second.prefill == "**Repair pipes:**"
    assert outline("skeleton") != mine


def test_a_template_can_change_a_part_of_the_one_it_replaces(tmp_path: Path) -> None:
    text = '{% extends "shipped/skeleton/outline.j2" %}{% block answer %}{% prefill %}I.{% endprefill %}{% endblock %}'
    mine = outline("skeleton", folder=write(tmp_path, "skeleton/outline", text))
    assert mine == ChatPrompt(outline("skeleton").messages, "I.")


def test_names_lists_what_render_knows(tmp_path: Path) -> None:
    shipped = prompts.names()
    assert {"skeleton/outline", "skeleton/expand", "skeleton/small/outline", "skeleton/small/expand"} <= set(shipped)
    assert set(prompts.names(write(tmp_path, "mine/one", "x"))) == {*shipped, "mine/one"}


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'skeleton/outline'"):
        prompts.render("skeleton/outlin", question=QUESTION)
    with pytest.raises(UnknownName):
        prompts.render("../prompts/skeleton/outline", question=QUESTION)


def test_an_unknown_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no folder of prompt templates at .*nowhere"):
        outline("skeleton", folder=tmp_path / "nowhere")


BROKEN = {
    "an undefined value": ('{% message "user" %}\n{{ topic }}\n{% endmessage %}', 2, "'topic' is undefined"),
    "an undefined field": (
        '{% message "user" %}\n\n{{ question.text }}\n{% endmessage %}',
        3,
        "has no attribute 'text'",
    ),
    "an unknown tag": ('\n{% mesage "user" %}x{% endmesage %}', 2, "unknown tag 'mesage'"),
    "an open tag": ('{% message "user" %}\nx', 2, "endmessage"),
    "a forbidden attribute": ('{% message "user" %}\n{{ question.__class__.__mro__ }}{% endmessage %}', 2, "unsafe"),
    "a change of a value": ('{% message "user" %}{{ history.append(1) }}{% endmessage %}', 1, "unsafe"),
    "a missing include": ('\n\n{% include "nothing.j2" %}', 3, "no template 'nothing.j2'"),
    "an unknown role": ('\n{% message "robot" %}x{% endmessage %}', 2, "not 'robot'"),
    "a second prefill": ("{% prefill %}a{% endprefill %}\n{% prefill %}b{% endprefill %}", 2, "come last"),
    "a message after the prefill": (
        '{% prefill %}a{% endprefill %}{% message "user" %}b{% endmessage %}',
        1,
        "come last",
    ),
    "an error while it runs": ('\n{% message "user" %}{{ 1 // 0 }}{% endmessage %}', 2, "division|by zero"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text, line, what = BROKEN[name]
    write(tmp_path, "mine/broken", text)
    with pytest.raises(InvalidRequest, match=rf"broken\.j2, line {line}: .*{what}.*\.$") as caught:
        prompts.render("mine/broken", folder=tmp_path, question=QUESTION, history=[])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"), [("hello", "'hello' stands outside"), ("{# nothing #}", "writes no message")]
)
def test_a_template_must_write_messages_and_nothing_else(text: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=f"'mine/broken': .*{what}"):
        prompts.render("mine/broken", folder=write(tmp_path, "mine/broken", text))


def test_a_failed_template_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path, "mine/broken", '{% message "user" %}left over{% endmessage %}{{ topic }}')
    with pytest.raises(InvalidRequest):
        prompts.render("mine/broken", folder=tmp_path)
    assert "left over" not in as_text(outline("skeleton"))


def test_a_stage_that_lacks_a_value_says_which() -> None:
    with pytest.raises(InvalidRequest, match=r"expand\.j2, line \d+: 'outline' is undefined"):
        prompts.render("skeleton/expand", question=QUESTION, index=1, title="x")
