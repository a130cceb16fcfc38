"""Routers: what decides, what it costs, and that a question sent to plain decoding is answered by plain decoding."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import decoding
import prompts
from decoding.backends.choice import named_option
from decoding.errors import CapabilityError, InvalidRequest, ModelError
from decoding.masked import Masking
from decoding.questions import Question
from decoding.strategies import SkeletonOfThought
from decoding.strategies.router import Always, Classifier, FunctionRouter, Prompted, as_router
from decoding.strategies.router.classifier import SHIPPED, Head, HeadCard, question_features
from decoding.types import Generation, Message, SamplingParams
from experiments.train_router import Decision, Scores, decide, fit, read, table, train
from tests.dictation import OUTLINED, QUESTION, Typist
from tests.refiners import Slope
from tests.tiny import EOS, tiny_model, tiny_tokenizer

PARAMS = SamplingParams(max_new_tokens=60)


def backend(**model: Any) -> decoding.LocalBackend:
    tiny = tiny_model("llama", **{"max_position_embeddings": 4096, **model})
    lm = decoding.LocalBackend(tiny, tiny_tokenizer(), name="tiny", eos=[EOS], slots=8, capacity=3072)
    lm.latency = Slope(0)  # type: ignore[assignment]  # a wide step costs what a narrow one does
    return lm


@pytest.fixture(scope="module")
def lm() -> decoding.LocalBackend:
    return backend()


def answer(lm: decoding.Backend, router: Any, question: str = QUESTION) -> Generation:
    lm.forget()
    options = {} if isinstance(lm, Typist) else {"outline": OUTLINED}
    strategy = SkeletonOfThought(router=router, **options)  # type: ignore[arg-type]
    generation: Generation = decoding.generate(question, lm, strategy=strategy, params=PARAMS)
    return generation


def is_plain(generation: Generation) -> bool:
    assert ("answer" in generation.parts) != ("outline" in generation.parts)
    return "answer" in generation.parts


def test_a_function_decides_by_the_text_of_the_question(lm: decoding.LocalBackend) -> None:
    asked: list[str] = []

    def short(question: str) -> bool:
        asked.append(question)
        return len(question) < 20

    assert is_plain(answer(lm, short)) and not is_plain(answer(lm, short, "Why sleep?"))
    talk: list[Message] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why eat?"}]
    decoding.generate(talk, lm, strategy=SkeletonOfThought(router=short, outline=OUTLINED), params=PARAMS)
    assert asked == [QUESTION, "Why sleep?", "Why eat?"]


@pytest.mark.parametrize("router", [lambda question: False, "prompt(threshold=0.999999)"], ids=["function", "prompt"])
def test_a_question_routed_to_plain_decoding_is_plain_decoding(lm: decoding.LocalBackend, router: Any) -> None:
    lm.forget()
    plain = decoding.generate(QUESTION, lm, params=PARAMS)
    out = answer(lm, router)
    assert (out.text, out.tokens, out.finish_reason) == (plain.text, plain.tokens, plain.finish_reason)
    assert out.metrics.forwards == plain.metrics.forwards and out.metrics.new_tokens == plain.metrics.new_tokens
    assert list(out.parts) == ["router", "answer"] and out.parts["router"].text.startswith("plain: ")


def test_always_asks_nobody(lm: decoding.LocalBackend) -> None:
    out = answer(lm, "always")
    assert "router" not in out.parts and not is_plain(out)
    assert SkeletonOfThought().router == Always() and str(SkeletonOfThought(router="always")) == "skeleton"


def test_the_prompted_router_compares_the_likelihood_of_letters(lm: decoding.LocalBackend) -> None:
    chat = prompts.render("router/small/route", question=QUESTION)
    ids = lm.encode(chat.messages)
    with torch.inference_mode():
        logits = lm.model(torch.tensor([ids])).logits[0, -1, [ord(letter) for letter in "ABC"]]
    choice = asyncio.run(lm.choose(chat.messages, "ABC"))
    assert list(choice.probabilities.values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
    assert choice.option == "ABC"[int(logits.argmax())]
    out = answer(lm, "prompt")
    assert is_plain(out) == (choice.option != "A")
    chances = ", ".join(f"{letter} {chance:.2f}" for letter, chance in choice.probabilities.items())
    route = "skeleton" if choice.option == "A" else "plain"
    assert out.parts["router"].text == f"{route}: {chances}"
    # One pass over the prompt, nothing generated, and no reply to parse.
    router = out.parts["router"]
    assert router.tokens == [] and sum(step.committed for step in router.trace) == 0
    assert router.metrics.prefill_tokens == len(ids) == sum(step.tokens for step in router.trace)
    assert set(router.trace) <= set(out.trace)
    assert is_plain(answer(lm, Prompted(threshold=0.999))) and not is_plain(answer(lm, Prompted(threshold=1e-6)))


def test_examples_of_the_prompted_router_are_read_once(lm: decoding.LocalBackend) -> None:
    lm.forget()
    first, second = (asyncio.run(Prompted().route(text, [], lm)).generation.metrics for text in (QUESTION, "Why?"))
    assert first.reused_tokens == 0 and second.prefill_tokens < 0.3 * second.prompt_tokens


def test_choices_must_differ_in_their_first_token(lm: decoding.LocalBackend) -> None:
    with pytest.raises(InvalidRequest, match="must begin with different tokens"):
        asyncio.run(lm.choose("Which?", ["yes", "yep"]))
    assert asyncio.run(lm.choose("Which?", ["yes", "no"])).option in ("yes", "no")


@pytest.mark.parametrize(
    ("reply", "option"),
    [("A", "A"), (" B.", "B"), ("The answer is C", "C"), ("**A**", "A"), ("Apples", None), ("", None), ("a", None)],
)
def test_a_reply_names_an_option(reply: str, option: str | None) -> None:
    assert named_option(reply, "ABC") == option


@pytest.mark.parametrize(("letter", "plain"), [("A", False), ("C: no list", True), ("I cannot say", True)])
def test_a_server_is_asked_by_text(letter: str, plain: bool) -> None:
    def reply(asked: str) -> str:
        if "Reply with one letter" in asked:
            return letter
        return "1. Soil\n2. Water" if "give only its outline" in asked else "Some text."

    out = answer(Typist(reply), "prompt")
    assert is_plain(out) == plain and out.error is None
    assert out.parts["router"].metrics.new_tokens == len(letter.split())


def test_the_classifier_needs_a_model_that_shows_its_states() -> None:
    with pytest.raises(CapabilityError, match="'tokens'"):
        answer(Typist(str), "classifier")


def test_a_head_learns_what_the_states_tell(lm: decoding.LocalBackend, tmp_path: Path) -> None:
    rows = [
        (n % 2, f"{'Name' if n % 2 else 'Compute'} {n * 37 % 101} {'things' if n % 2 else 'times two'}")
        for n in range(40)
    ]
    file = tmp_path / "questions.csv"
    file.write_text("label;request\n" + "".join(f"{label};{text}\n" for label, text in rows), encoding="utf-8")
    head = train(lm, str(file), [1, 3])
    assert head.card.accuracy > 0.8 and head.card.always_no == 0.5 and head.card.questions == 40
    path = tmp_path / "heads" / "mine.safetensors"
    head.save(path)
    loaded = Head.load(path)
    assert loaded.card == head.card and torch.equal(loaded.weight, head.weight)
    router = Classifier(head=str(path))

    def route(router: Classifier, text: str) -> bool:
        return asyncio.run(router.route(text, [], lm)).skeleton

    for _, text in rows[:6]:
        features, tokens = question_features(lm, text, [1, 3])
        assert len(features) == 2 * lm.engine.runner.config.hidden_size and tokens == len(lm.encode(text))
        chance = loaded.probability(features)
        assert route(router, text) == (chance >= 0.5)
        assert not route(Classifier(str(path), threshold=0.999999), text)
    out = answer(lm, router, text)
    assert is_plain(out) == (chance < 0.5) and f"probability of a list {chance:.2f}" in out.parts["router"].text
    cost = out.parts["router"].metrics
    assert cost.prefill_tokens == tokens and cost.seconds > 0
    assert out.metrics.prefill_tokens == sum(step.tokens for step in out.trace if step.prefill) + tokens
    # Of another model it is refused, and of the same one in half precision it is not.
    with pytest.raises(ModelError, match="trained on another model"):
        answer(backend(seed=9), router)
    half = backend()
    half.model.to(torch.bfloat16)  # type: ignore[arg-type]
    assert head.fits(half)


def test_a_head_that_is_missing_or_broken_is_named(lm: decoding.LocalBackend, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no router head is shipped for tiny; .*router=prompt"):
        answer(lm, "classifier")
    broken = tmp_path / "broken.safetensors"
    for content in (None, b"nonsense"):
        if content:
            broken.write_bytes(content)
            broken.with_suffix(".json").write_text("{}")
        with pytest.raises(ModelError, match=r"broken\.safetensors and its \.json are no router head"):
            answer(lm, Classifier(head=str(broken)))


def test_shipped_heads_are_small_and_say_where_they_come_from() -> None:
    cards = sorted(SHIPPED.glob("*.json"))
    assert [card.stem for card in cards] == ["smollm2-135m"]
    for card in cards:
        head = Head.load(card.with_suffix(".safetensors"))
        assert card.with_suffix(".safetensors").stat().st_size < 100_000
        assert isinstance(head.card, HeadCard) and head.card.accuracy > head.card.always_no
        assert len(head.weight) % len(head.card.layers) == 0 and torch.isfinite(head.weight).all()
        assert json.loads(card.read_text())["source"] == "router"


def test_logistic_regression_finds_a_known_boundary() -> None:
    generator = torch.Generator().manual_seed(1)
    features = 3 + 5 * torch.randn(400, 3, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] - 2 * features[:, 1] + 4 > 0).double()
    weight, bias = fit(features, labels, 1e-5)
    assert ((features @ weight + bias > 0).double() == labels).float().mean() > 0.98
    assert math.isclose(float(weight[1] / weight[0]), -2, rel_tol=0.15)
    noise, _ = fit(features, (torch.rand(400, generator=generator) < 0.5).double(), 1e-2)
    assert noise.norm() < 0.1 * weight.norm()


def test_scores_count_what_they_say() -> None:
    scores = Scores.of([True, True, False, False, False], [True, False, True, False, False])
    assert (scores.accuracy, scores.precision, scores.recall, scores.always_no) == (0.6, 0.5, 0.5, 0.6)
    assert "always no 60.0%" in str(scores)


def test_decisions_are_counted_by_category(lm: decoding.LocalBackend, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        "".join(
            json.dumps({"question_id": n, "category": category, "turns": [text]}) + "\n"
            for n, (category, text) in enumerate([("math", "WHAT IS 2?"), ("math", "why?"), ("generic", "NAME TWO")])
        )
    )
    (tmp_path / "l.csv").write_text("label;request\n0;WHAT IS 2?\n0;why?\n1;NAME TWO\n")
    with pytest.raises(InvalidRequest, match="--labels"):
        read(str(tmp_path / "q.jsonl"))
    questions = read(str(tmp_path / "q.jsonl"), str(tmp_path / "l.csv"))
    decisions = asyncio.run(decide(lm, as_router(str.isupper), questions))
    assert [decision.right for decision in decisions] == [False, True, True]
    _, math_, generic, every = table(decisions).splitlines()
    assert math_.split()[:5] == ["math", "2", "50.0%", "0.0%", "0.0%"]
    assert generic.split()[:5] == ["generic", "1", "100.0%", "100.0%", "100.0%"]
    assert every.split()[:6] == ["all", "3", "66.7%", "50.0%", "100.0%", "66.7%"]
    assert len(table([Decision(Question("1", "math", ("?",), list_type=True), True, 0.1)]).splitlines()) == 2


def test_routers_have_text_forms() -> None:
    for text in ("always", "prompt", "prompt(threshold=0.3)", "classifier(threshold=0.7)"):
        assert str(as_router(text)) == text and as_router(text) == as_router(str(as_router(text)))
    assert as_router(str.isupper) == FunctionRouter(str.isupper)


def test_a_masked_model_has_no_next_token_to_choose_by() -> None:
    lm = backend()
    lm.masking = Masking(mask=3, span=0)
    with pytest.raises(CapabilityError, match="fills masks in; use router=always"):
        asyncio.run(lm.choose("A or B?", ("A", "B")))
