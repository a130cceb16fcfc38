"""The exact tasks, what models are trained on from them, a training run in small, and the models that ship."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import decoding
from decoding.cli import main
from decoding.errors import InvalidRequest
from decoding.options import Schedule
from decoding.questions import Question
from decoding.report.curves import Curve, chart
from experiments import nar_quality, train_tasks
from experiments.tasks import (
    EOS,
    LENGTH,
    LONGEST_ANSWER,
    MASK,
    PAD,
    TASKS,
    UNK,
    Example,
    correct,
    encode,
    examples,
    spelled,
    tokenizer,
)
from experiments.train_tasks import BLOCK, OBJECTIVES


def test_answers_are_right_and_survive_the_tokenizer() -> None:
    fast = tokenizer()
    for example in islice(examples(3, test=False), 600):
        prompt, answer = encode(fast, example)
        assert UNK not in [*prompt, *answer] and len(answer) <= LONGEST_ANSWER
        assert correct(example, str(fast.decode(answer))) and not correct(example, str(fast.decode(answer[:-1])))
        chat = fast.apply_chat_template([{"role": "user", "content": example.prompt}], tokenize=False)
        assert fast(chat, add_special_tokens=False)["input_ids"] == prompt
        given = example.prompt.split(" ", 1)[1]
        if example.task == "add":
            assert sum(map(int, given.split(" + "))) == int(example.answer)
        if example.task == "sort":
            assert sorted(map(int, given.split())) == list(map(int, example.answer.split()))
    assert spelled(204_066) == "two hundred four thousand sixty six" and spelled(20) == "twenty"


def test_training_and_test_prompts_never_meet() -> None:
    training = {example.prompt for example in islice(examples(1, test=False), 5000)}
    held_out = {example.prompt for example in islice(examples(2, test=True), 2000)}
    assert not training & held_out
    assert {example.task for example in islice(examples(2, test=True), len(TASKS))} == set(TASKS)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_is_asked_for_the_answer_and_shown_no_more_than_it_will_be(objective: str) -> None:
    fast = tokenizer()
    items = [encode(fast, example) for example in islice(examples(5, test=False), 60)]
    batch = OBJECTIVES[objective](items, torch.Generator().manual_seed(0))
    for i, (prompt, answer) in enumerate(items):
        asked = batch.weights[i].nonzero()[:, 0].tolist()
        assert asked and min(asked) >= len(prompt) - 1
        right = [*prompt, *answer, *[EOS] * (2 * BLOCK)]
        if objective == "causal":
            assert batch.labels[i, asked].tolist() == right[len(prompt) : len(prompt) + len(answer) + 1]
            continue
        masked = [place for place in asked if batch.tokens[i, place] == MASK]
        assert masked and (batch.weights[i, masked] == 1).all()
        assert batch.visible is not None
        if objective == "block-diffusion":
            assert len({place // BLOCK for place in asked}) == 1
            assert batch.labels[i, asked].tolist() == [right[place] for place in asked]
            sees = batch.visible[0, 0, asked[0]].nonzero()[:, 0].tolist()
            assert max(sees) == asked[0] // BLOCK * BLOCK + BLOCK - 1
        else:
            length = LENGTH + len(answer) - 1
            assert batch.labels[i, len(prompt)] == length
            alone = batch.tokens[i, len(prompt)] == MASK
            assert bool((batch.labels[i, len(prompt) + 1 :] == PAD).all()) == bool(alone)
            assert alone or batch.tokens[i, len(prompt)] == length


def small_run(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    small = ["--batch", "4", "--hidden", "32", "--layers", "2", "--every", "2", "--output", str(folder)]
    monkeypatch.setattr(train_tasks, "_POOL", 1)
    monkeypatch.setattr(sys, "argv", ["train_tasks", arguments[0], *small, *arguments[1:]])
    train_tasks.main()


def test_a_training_run_that_is_killed_while_it_saves_goes_on_and_its_model_answers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kill_in_save: Callable[[int], None],
) -> None:
    folder = tmp_path / "model"
    kill_in_save(2)
    with pytest.raises(KeyboardInterrupt):
        small_run(folder, monkeypatch, "block-diffusion", "--steps", "4")
    capsys.readouterr()
    small_run(folder, monkeypatch, "block-diffusion", "--steps", "4", "--resume")
    assert re.findall(r"step \d/\d", capsys.readouterr().out) == ["step 4/4"]
    card = json.loads((folder / "training.json").read_text())
    assert card["steps"] in (2, 4) and card["examples"] == 4 * card["steps"] and card["validation_loss"] > 0
    assert json.loads((folder / "checkpoint" / "run.json").read_text())["step"] == 4
    lm = decoding.load(str(folder))
    assert lm.masking is not None and (lm.masking.mask, lm.masking.span) == (MASK, BLOCK)
    params = decoding.SamplingParams(max_new_tokens=8)
    assert decoding.generate("add 3 + 4", lm, strategy="block-diffusion", params=params).error is None


def test_what_cannot_be_trained_or_resumed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            small_run(tmp_path, monkeypatch, *arguments)
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    for option, value in (("--every", "0"), ("--steps", "-1"), ("--hidden", "12"), ("--learning-rate", "0")):
        assert f"error: {option} must be" in said("causal", option, value)
    assert "error: there is no checkpoint in" in said("causal", "--resume")
    small_run(tmp_path, monkeypatch, "causal", "--steps", "2")
    assert "a run with other objective;" in said("mask-predict", "--resume")
    assert "a run with other hidden, layers;" in said("causal", "--hidden", "64", "--layers", "1", "--resume")
    assert "a run with other batch;" in said("causal", "--batch", "8", "--resume")
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "checkpoint is damaged" in said("causal", "--resume")
    (tmp_path / "checkpoint" / "run.json").write_text("{}")
    assert "checkpoint is damaged" in said("causal", "--resume")


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("causal", "autoregressive"), ("block-diffusion", "block-diffusion"), ("mask-predict", "mask-predict")],
)
def test_the_shipped_models_do_what_they_were_trained_for(name: str, strategy: str) -> None:
    folder = nar_quality.MODELS / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4 * 2**20
    lm = decoding.load(str(folder))
    questions = [example for example in islice(examples(10**9, test=True), 60) if example.task in ("date", "digits")]
    setting, answers = nar_quality.measured(lm, "family", strategy, questions)
    assert setting.accuracy > 0.5
    wrong = [Example(q.task, q.prompt, q.answer + "0") for q in questions]
    assert not any(correct(q, a.text) for q, a in zip(wrong, answers, strict=True))
    if name != "causal":
        assert setting.tokens_per_pass > 1


def test_masked_models_answer_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(nar_quality.MODELS / "block-diffusion")
    text = "block-diffusion(policy=entropy(bound=0.2), cache=prefix)"
    assert main(["generate", "date 3 May 2028", "--model", model, "--strategy", text, "--max-new-tokens", "16"]) == 0
    assert capsys.readouterr().out.strip() == "2028-05-03"
    assert main(["generate", "date 3 May 2028", "--model", model]) == 2
    assert "use block-diffusion or mask-predict" in capsys.readouterr().err


def test_the_verdict_weighs_accuracy_and_passes() -> None:
    def setting(family: str, strategy: str, accuracy: float, passes: float) -> nar_quality.Setting:
        return nar_quality.Setting("m", family, f"block-diffusion(policy={strategy})", accuracy, {}, passes, 1.0, 0.0)

    slow = setting(nar_quality.ONE, "fixed", 0.9, 12.0)
    close, far = setting("confidence", "a", 0.895, 3.9), setting("confidence", "b", 0.8, 2.0)
    assert "reached" in nar_quality.judge([slow, close, far])
    assert "missed" in nar_quality.judge([slow, setting("confidence", "a", 0.895, 4.1), far])
    assert "no confidence threshold" in nar_quality.judge([slow, far])
    harder = setting(nar_quality.ONE_END_LAST, "fixed, eos_last=true", 0.9, 8.0)
    assert ["reached" in line for line in nar_quality.judge([slow, harder, close]).splitlines()] == [True, False]
    assert nar_quality.picture([slow, close, far]).count("<circle") == 3 + 2


def test_the_page_of_the_shipped_models_says_what_was_measured() -> None:
    found = json.loads((nar_quality.MODELS / "results.json").read_text())
    text = (nar_quality.MODELS / "README.md").read_text()
    settings = [nar_quality.Setting(**setting) for setting in found["settings"]]
    made = nar_quality.page(nar_quality.MODELS, settings, found["questions"])
    assert nar_quality.rewritten(text, made) == text, (
        "run python -m experiments.nar_quality --output experiments/models"
    )
    settings[0] = replace(settings[0], passes=1.0)
    assert nar_quality.rewritten(text, nar_quality.page(nar_quality.MODELS, settings, found["questions"])) != text
    assert nar_quality.rewritten("no place for figures", made) == "no place for figures"


def test_a_chart_is_well_formed_and_has_every_point() -> None:
    from xml.etree import ElementTree

    random.seed(0)
    curves = [Curve(f"<{n}>", [(2**i, random.random()) for i in range(n + 1)]) for n in range(3)]
    root = ElementTree.fromstring(chart("a & b", "x", "y", curves))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 1 + 2 + 3 + 3


@pytest.fixture(scope="module")
def filler() -> decoding.LocalBackend:
    return decoding.load(str(nar_quality.MODELS / "mask-predict"), slots=4)


def test_mask_predict_stops_where_it_is_told_to(filler: decoding.LocalBackend) -> None:
    params = decoding.SamplingParams(max_new_tokens=32, logprobs=True)
    whole = decoding.generate("date 3 May 2028", filler, strategy="mask-predict", params=params)
    assert (whole.text, whole.finish_reason) == (" 2028-05-03", "length")
    pieces: list[str] = []
    cut = decoding.generate(
        "date 3 May 2028", filler, strategy="mask-predict", params=params.but(stop=["-"]), on_text=pieces.append
    )
    assert (cut.text, cut.finish_reason, pieces) == (" 2028", "stop", [" 2028"])
    assert whole.logprobs is not None
    assert (cut.tokens, cut.logprobs) == (whole.tokens[:5], whole.logprobs[:5])
    assert cut.metrics.new_tokens == 5 and filler.tokenizer.decode(cut.tokens) == " 2028-"


def test_mask_predict_shows_its_first_token_when_it_has_chosen(filler: decoding.LocalBackend) -> None:
    out = decoding.generate("date 3 May 2028", filler, strategy="mask-predict")
    assert out.metrics.first_token_seconds == out.metrics.seconds > max(step.end for step in out.trace)
    conversation = Question("q", "c", ("date 3 May 2028", "date 4 May 2028"))
    (record,) = decoding.compare([conversation], filler, strategies=["mask-predict"], schedule=Schedule(warm_up=0))
    lengths = min(step.end for step in record.trace if step.committed)
    assert record.parts["turn 1, length"] and lengths < record.metrics.first_token_seconds < record.metrics.seconds


def test_a_length_that_cannot_be_announced_is_refused(filler: decoding.LocalBackend) -> None:
    with pytest.raises(InvalidRequest, match="length 50 is more than the 16 tokens"):
        decoding.generate("date 3 May 2028", filler, strategy="mask-predict(length=50)")
