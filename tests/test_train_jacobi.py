"""Consistency training: packed iterates see what they would see alone, training resumes, and adapters are what peft
makes of them."""

from __future__ import annotations

import importlib.resources
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import decoding
from decoding.engine.engine import Engine
from decoding.engine.runner import Runner
from decoding.errors import InvalidRequest, ModelError, RecordError, UnknownName
from decoding.models import LoadedModel
from decoding.report.film import shoot
from decoding.strategies import Jacobi
from decoding.strategies.adapter import (
    CARD,
    CONFIG,
    WEIGHTS,
    about,
    fingerprint,
    load_adapter,
    merged,
    shipped_adapters,
)
from drafters.training.corpus import Document
from drafters.training.distill import HELD_OUT, save_answers
from experiments import train_jacobi, trajectories
from experiments.consistency import Branch, ConsistencyLoss, Packed, Trajectory, choose, pack
from experiments.jacobi_validation import both
from experiments.train_jacobi import Training, _with_lora, train
from experiments.trajectories import collect, corrupt, follow, repetitive
from tests.refiners import prompts
from tests.tiny import EOS, tiny_model, tiny_tokenizer

OPTIONS = Training(
    block_size=6, max_new_tokens=24, rank=4, alpha=8, epochs=2, batch=2, learning_rate=5e-3, evaluate_every=3,
    save_every=2, validation_tokens=16,
)  # fmt: skip
TRAJECTORY = Trajectory(
    [5, 6, 7, 8, 9, 10, 11, 12], 3, [Branch(4, [20, 21, 22]), Branch(3, [30, 31]), Branch(6, [40, 41, 42])]
)


def backend(model: Any = None) -> decoding.LocalBackend:
    model = model or tiny_model(max_position_embeddings=2048)
    return decoding.LocalBackend(model, tiny_tokenizer(), name="tiny", eos=[EOS], slots=8, capacity=1536)


def hidden_alone(model: Any, tokens: list[int]) -> torch.Tensor:
    return model.get_decoder()(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


def farthest(packed: Packed) -> float:
    """How far the packed hidden states of every branch lie from those of plain forwards, at most."""
    model: Any = tiny_model()
    with torch.no_grad():
        hidden = ConsistencyLoss(model)._hidden(packed)[0]
        gaps, at = [], len(TRAJECTORY.tokens)
        for branch in TRAJECTORY.branches:
            alone = hidden_alone(model, [*TRAJECTORY.tokens[: branch.start], *branch.guesses])[branch.start :]
            gaps.append((hidden[at : at + len(branch.guesses)] - alone).abs().max())
            at += len(branch.guesses)
    return float(max(gaps))


def test_a_packed_branch_sees_the_answer_before_it_and_itself() -> None:
    packed = pack([TRAJECTORY, Trajectory([1, 2, 3], 1, [])])
    assert farthest(packed) < 1e-4
    leaky = Packed(**{**vars(packed), "mask": torch.ones_like(packed.mask).tril()})
    assert farthest(leaky) > 1e-2, "the comparison does not notice a wrong mask"


def test_iterates_learn_what_the_answer_says_at_the_same_place() -> None:
    packed = pack([TRAJECTORY])
    n = len(TRAJECTORY.tokens)
    assert packed.rows[:, 1].tolist() == [2, 3, 4, 5, 6] and packed.targets.tolist() == [8, 9, 10, 11, 12]
    assert packed.students[:, 1].tolist() == [n, n + 1, n + 2, n + 3, n + 4, n + 5]
    assert packed.teachers[:, 1].tolist() == [4, 5, 6, 3, 4, 6], "the last branch reaches beyond the answer"
    model: Any = tiny_model()
    with torch.no_grad():
        losses = ConsistencyLoss(model, answer_weight=2.0)(packed)
        text = model(torch.tensor([TRAJECTORY.tokens])).logits[0]
        answer = torch.nn.functional.cross_entropy(text[2:-1], packed.targets)
        branch = model(torch.tensor([[*TRAJECTORY.tokens[:4], 20, 21, 22]])).logits[0, 4:]
        one = -(text[4:7].softmax(-1) * branch.log_softmax(-1)).sum(-1)
    only = ConsistencyLoss(model, answer_weight=2.0)(pack([Trajectory(TRAJECTORY.tokens, 3, TRAJECTORY.branches[:1])]))
    assert losses.answer == pytest.approx(answer.item(), rel=1e-4)
    assert only.consistency == pytest.approx(one.mean().item(), rel=1e-4)
    assert losses.total.item() == pytest.approx(2 * losses.answer + losses.consistency, rel=1e-4)


def test_trajectories_are_the_iterates_of_greedy_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, work = backend(), prompts(5)
    found = follow(lm, work, block_size=6, max_new_tokens=24)
    params = decoding.SamplingParams(max_new_tokens=24)
    plain = {tuple(p): decoding.generate(p, lm, params=params).tokens for p in work}
    assert found and not lm.engine.filming
    for trajectory in found:
        prompt, answer = trajectory.tokens[: trajectory.prompt], trajectory.tokens[trajectory.prompt :]
        assert plain[tuple(prompt)] == answer and trajectory.branches
        for branch in trajectory.branches:
            assert branch.guesses[0] != trajectory.tokens[branch.start], "a branch starts at its first wrong guess"
            assert len(branch.guesses) <= 5
    options: dict[str, Any] = {"block_size": 6, "max_new_tokens": 24}
    lm.forget()  # a prompt that is not read again leaves one more step to guess in
    again = collect(lm, work, tmp_path, **options)
    assert again == found
    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "follow", None)
        assert collect(lm, work, tmp_path, **options) == found, "the second time it is read"
    lm.forget()
    more = collect(lm, [*work, *prompts(3, seed=5)], tmp_path, **options)
    assert more[: len(found)] == found and len(more) > len(found), "other prompts"
    other = backend(tiny_model(seed=5, max_position_embeddings=2048))
    theirs = collect(other, work, tmp_path, **options)
    other.forget()
    assert theirs == follow(other, work, **options) != found, "another model"


def test_what_turns_in_a_circle_is_left_out() -> None:
    assert repetitive([1, 2, 3, 4] * 12) and not repetitive(list(range(60)))
    assert sum(len(b.guesses) for b in choose(TRAJECTORY, 4, Random(0)).branches) in (5, 6)
    assert {len(b.guesses) for b in choose(TRAJECTORY, 99, Random(0), depth=1).branches} == {1}


def test_made_up_iterates_are_wrong_first_and_end_with_the_answer() -> None:
    tokens = [*range(20, 30), *range(30, 60)]
    made = corrupt(tokens, 10, 3, Random(1))
    assert (made.tokens, made.prompt) == (tokens, 10)
    assert [b.start for b in made.branches] == sorted({b.start for b in made.branches}) and len(made.branches) > 20
    for branch in made.branches:
        assert 10 <= branch.start < len(tokens) - 1 and branch.guesses[0] != tokens[branch.start]
        assert len(branch.guesses) == min(3, len(tokens) - 1 - branch.start)
        assert set(branch.guesses) <= set(tokens)
    packed = pack([made])
    assert len(packed.students) == sum(len(b.guesses) for b in made.branches)


def test_training_can_be_kept_to_the_last_layers() -> None:
    pytest.importorskip("peft")
    model = tiny_model(num_hidden_layers=3)
    for layers, changed in ((0, {0, 1, 2}), (1, {2}), (2, {1, 2}), (9, {0, 1, 2})):
        adapter = _with_lora(model, Training(layers=layers, rank=2))
        trained = {name for name, weight in adapter.named_parameters() if weight.requires_grad}
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in trained} == changed
        model = adapter.unload()


@pytest.mark.parametrize(
    "option",
    [{"layers": -1}, {"evaluate_every": 0}, {"save_every": 0}, {"validation": 0}, {"validation_tokens": 0},
     {"warmup": -3}, {"warmup": 1.5}, {"clip": 0}],
)  # fmt: skip
def test_options_out_of_range_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(option))):
        Training(**option)


def test_training_teaches_resumes_and_leaves_an_adapter_that_decodes(
    tmp_path: Path, kill_in_save: Callable[[int], None]
) -> None:
    pytest.importorskip("peft")
    lm = backend()
    found = follow(lm, prompts(6, seed=4), block_size=6, max_new_tokens=24)
    held_out = [Document(torch.tensor(t.tokens), t.prompt, 0, 0) for t in found[:3]]

    def loaded(seed: int = 2) -> LoadedModel:
        return LoadedModel(tiny_model(seed=seed), tiny_tokenizer(), "tiny", "")

    whole = train(loaded(), found, held_out, OPTIONS, tmp_path / "whole")
    assert whole.steps == whole.total == 2 * -(-len(found) // 2)
    best = whole.best
    assert best is not None and whole.validations[0].agreement == 1, "before training it is the base model"

    kill_in_save(2)
    with pytest.raises(KeyboardInterrupt):
        train(loaded(), found, held_out, OPTIONS, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "checkpoint" / "run.json").read_text())["steps"] == OPTIONS.save_every
    cut = train(loaded(), found, held_out, OPTIONS, tmp_path / "cut")
    assert [v.step for v in cut.validations] == [v.step for v in whole.validations]
    assert cut.validations[-1].perplexity == pytest.approx(whole.validations[-1].perplexity, rel=1e-3)
    with pytest.raises(RecordError, match="differs in epochs;"):
        train(loaded(), found, held_out, replace(OPTIONS, epochs=3), tmp_path / "cut")
    with pytest.raises(RecordError, match="differs in fingerprint;"):
        train(loaded(seed=5), found, held_out, OPTIONS, tmp_path / "cut")
    with pytest.raises(RecordError, match="differs in data;"):
        train(loaded(), found[::-1], held_out, OPTIONS, tmp_path / "cut")
    with pytest.raises(RecordError, match="differs in data;"):
        train(loaded(), found, held_out[:2], OPTIONS, tmp_path / "cut")

    from peft import PeftModel

    folder = tmp_path / "whole" / "adapter"
    peft_model: Any = PeftModel.from_pretrained(tiny_model(), str(folder))
    theirs = backend(peft_model.merge_and_unload())
    params = decoding.SamplingParams(max_new_tokens=16)
    strategy = Jacobi(block_size=6, adapter=str(folder))
    for prompt in prompts(3, seed=4):
        adapted = decoding.generate(prompt, lm, strategy=strategy, params=params)
        assert adapted.tokens == decoding.generate(prompt, theirs, params=params).tokens
        assert adapted.metrics.drafted > 0 and not strategy.lossless
    assert json.loads((folder / CARD).read_text())["validation"]["step"] == best.step
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == loaded().name
    lm.forget()
    assert not next(iter(lm.variants.values())).engine.cache.lengths.any()


def test_the_command_trains_on_answers_of_its_model_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    lm = backend()
    lm.model.save_pretrained(tmp_path / "tiny")
    lm.tokenizer.save_pretrained(tmp_path / "tiny")
    options = f"--model {tmp_path / 'tiny'} --output {tmp_path / 'run'} --rank 2 --block-size 4 --epochs 1"
    options += " --max-new-tokens 16 --validation 2 --validation-tokens 8"
    for name in ("tiny", "other"):
        lm.name, answers = name, tmp_path / f"answers of {name}"
        answers.mkdir()
        save_answers(lm, [f"Question {i}?" for i in range(4)], 16, answers / "shard-00000.safetensors")
        save_answers(lm, ["Who?", "When?"], 16, answers / HELD_OUT)
        monkeypatch.setattr(sys, "argv", ["train_jacobi", *options.split(), "--answers", str(answers)])
        if name == "tiny":
            train_jacobi.main()
            assert load_adapter(str(tmp_path / "run" / "adapter")).updates
    with pytest.raises(RecordError, match=r"holds answers of other, not of tiny; use its own\."):
        train_jacobi.main()


def lora(folder: Path, model: Any, rank: int = 2, **card: Any) -> Path:
    """An adapter of random updates of the first attention layer, written by hand."""
    folder.mkdir()
    layer = model.model.layers[0].self_attn
    torch.manual_seed(0)
    tensors = {}
    for name in ("q_proj", "v_proj"):
        out, into = getattr(layer, name).weight.shape
        key = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, into)
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    (folder / CARD).write_text(json.dumps(card))
    return folder


def test_the_adapted_model_decodes_beside_the_base_model_and_shares_its_tensors(tmp_path: Path) -> None:
    lm = backend()
    adapter = str(lora(tmp_path / "lora", lm.model))
    params = decoding.SamplingParams(max_new_tokens=12)
    prompt = prompts(1)[0]
    before = decoding.generate(prompt, lm, params=params).tokens
    adapted = decoding.generate(prompt, lm, strategy=Jacobi(block_size=4, adapter=adapter), params=params)
    assert decoding.generate(prompt, lm, params=params).tokens == before != adapted.tokens
    (variant,) = lm.variants.values()
    ours: dict[str, Any] = dict(variant.model.named_parameters())
    for name, parameter in lm.model.named_parameters():
        touched = "layers.0.self_attn.q_proj" in name or "layers.0.self_attn.v_proj" in name
        assert (ours[name] is parameter) != touched
    engine = Engine(Runner(variant.model, slots=2, capacity=64))
    assert engine.runner.vocab == lm.engine.runner.vocab
    nested = decoding.generate(
        "List", lm, strategy=f"skeleton(inner=jacobi(block_size=4, adapter='{adapter}'))", params=params
    )
    assert nested.error is None and len(lm.variants) == 1


@pytest.mark.parametrize("strategy", ["jacobi({})", "skeleton(inner=jacobi({}))"])
def test_the_first_film_of_an_adapted_model_shows_it(tmp_path: Path, strategy: str) -> None:
    lm = backend()
    strategy = strategy.format(f"block_size=4, adapter='{lora(tmp_path / 'lora', lm.model)}'")
    films = [shoot("List", lm, strategy=strategy, params=decoding.SamplingParams(max_new_tokens=12)) for _ in range(2)]
    assert films[0].reels and [len(film.reels) for film in films] == [len(films[0].reels)] * 2
    assert not any(home.engine.filming for home in (lm, *lm.variants.values()))


def test_an_adapter_in_the_package_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, params = backend(), decoding.SamplingParams(max_new_tokens=12)
    (tmp_path / "adapters").mkdir()
    folder = lora(tmp_path / "adapters" / "mine", lm.model)
    by_folder = decoding.generate([5, 6, 7], lm, strategy=Jacobi(block_size=4, adapter=str(folder)), params=params)
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    by_name = decoding.generate([5, 6, 7], lm, strategy="jacobi(block_size=4, adapter=mine)", params=params)
    assert by_name.tokens == by_folder.tokens != decoding.generate([5, 6, 7], lm, params=params).tokens
    with pytest.raises(UnknownName, match="did you mean 'mine'"):
        decoding.generate("Hi", lm, strategy="jacobi(adapter=mime)")


def test_a_validation_tells_the_adapted_model_from_the_base(tmp_path: Path) -> None:
    lm = backend()
    base, trained = both(lm, str(lora(tmp_path / "lora", lm.model)), prompts(3), 16)
    assert (base.agreement, base.questions) == (1, 3) and trained.agreement < 1
    assert base.tokens_per_forward >= 1 and trained.divergence < base.divergence
    assert base.perplexity is not None and trained.perplexity is not None and base.perplexity < trained.perplexity


def fit_to_ship(folder: Path) -> bool:
    """Whether an adapter is small and knows its model, which is none of ours."""
    adapter = load_adapter(str(folder))
    if not adapter.updates or sum(file.stat().st_size for file in folder.iterdir()) > 20e6:
        return False
    try:
        merged(tiny_model(), adapter)
    except ModelError as error:
        return adapter.fingerprint is not None and "is for another model" in str(error)
    return False


def test_adapters_that_ship_are_small_and_know_their_model(tmp_path: Path) -> None:
    theirs = tiny_model(seed=5)
    mark = list(fingerprint(theirs))
    known = lora(tmp_path / "known", theirs, fingerprint=mark)
    assert merged(theirs, load_adapter(str(known))) is not theirs
    large = lora(tmp_path / "large", theirs, fingerprint=mark)
    (large / "optimizer.bin").write_bytes(bytes(20_000_000))
    empty = lora(tmp_path / "empty", theirs, fingerprint=mark)
    save_file({}, empty / WEIGHTS)
    unmarked = lora(tmp_path / "unmarked", theirs)
    ours = lora(tmp_path / "ours", theirs, fingerprint=list(fingerprint(tiny_model())))
    assert [fit_to_ship(folder) for folder in (known, large, empty, unmarked, ours)] == [True, *[False] * 4]
    assert all(map(fit_to_ship, shipped_adapters().values()))


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    lm = backend()
    wide = lora(tmp_path / "wide", tiny_model(hidden_size=48))
    deep = lora(tmp_path / "deep", lm.model)
    weights = tmp_path / "other"
    lora(weights, lm.model, fingerprint=[1.0] * 16)
    for folder in (wide, weights):
        with pytest.raises(ModelError, match="is for another model"):
            decoding.generate("Hi", lm, strategy=Jacobi(adapter=str(folder)))
    with pytest.raises(ModelError, match="is for another model"):
        decoding.generate("Hi", backend(tiny_model("gpt2")), strategy=Jacobi(adapter=str(deep)))
    with pytest.raises(UnknownName, match="adapter"):
        decoding.generate("Hi", lm, strategy="jacobi(adapter=no-such)")
    (deep / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is not a LoRA adapter"):
        decoding.generate("Hi", lm, strategy=Jacobi(adapter=str(deep)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lora_alpha": None}, "float"),
        ({"lora_alpha": "x"}, "'x'"),
        ({"alpha_pattern": {"(": 3}}, "unterminated"),
        ({"alpha_pattern": [1]}, "items"),
        ("[]", f"{CONFIG} holds no JSON object"),
        ({"peft_type": "LORA"}, "'lora_alpha' is missing"),
    ],
)
def test_a_configuration_that_is_none_is_said(tmp_path: Path, change: Any, why: str) -> None:
    folder = lora(tmp_path / "lora", tiny_model())
    kept = {} if change == {"peft_type": "LORA"} else json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(change if isinstance(change, str) else json.dumps(kept | change))
    with pytest.raises(ModelError, match=f"is not a LoRA adapter.*{why}"):
        load_adapter(str(folder))


@pytest.mark.parametrize("card", [[1], {"fingerprint": "abc"}, {"fingerprint": 3}, {"fingerprint": [None]}])
def test_a_card_that_is_none_is_said(tmp_path: Path, card: Any) -> None:
    folder = lora(tmp_path / "lora", tiny_model())
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(ModelError, match="is not a LoRA adapter"):
        load_adapter(str(folder))
    (folder / CARD).write_text(json.dumps({"training": [16]}))
    assert about(folder) == "LoRA of rank 2"


def test_updates_that_cannot_be_multiplied_are_said(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", tiny_model(), fingerprint=[1.0])
    with pytest.raises(ModelError, match="is for another model"):  # a fingerprint of another length
        merged(tiny_model(), load_adapter(str(folder)))
    tensors = load_file(folder / WEIGHTS)
    for up, down, why in ((1, 2, "do not fit each other"), (0, 0, "is not a LoRA adapter")):
        cut = {key: (t[:up] if "lora_A" in key else t[:, :down].contiguous()) for key, t in tensors.items()}
        save_file(cut, folder / WEIGHTS)
        with pytest.raises(ModelError, match=why):
            load_adapter(str(folder))


def test_an_adapter_that_was_trained_anew_is_read_again(tmp_path: Path) -> None:
    lm, params = backend(), decoding.SamplingParams(max_new_tokens=8)
    folder = lora(tmp_path / "lora", lm.model)
    strategy = Jacobi(block_size=4, adapter=str(folder))
    before = decoding.generate([5, 6, 7], lm, strategy=strategy, params=params).tokens
    (kept,) = lm.variants.values()
    decoding.generate([5, 6, 7], lm, strategy=strategy, params=params)
    assert list(lm.variants.values()) == [kept], "nothing was written in between"
    save_file({key: -3 * tensor for key, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    after = decoding.generate([5, 6, 7], lm, strategy=strategy, params=params).tokens
    assert before != after == decoding.generate([5, 6, 7], backend(), strategy=strategy, params=params).tokens
    assert len(lm.variants) == 1, "the model of before is let go"
