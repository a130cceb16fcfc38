"""Training of heads: data, features, the unrolled loss, and a run that can be interrupted anywhere."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from decoding.backends.local import LocalBackend
from decoding.engine.runner import embeddings as embeddings_of
from decoding.errors import InvalidRequest, RecordError
from decoding.models import LoadedModel
from drafters.heads.checkpoint import read_head
from drafters.heads.eagle import Eagle3Head
from drafters.training import distill, eagle, fit, medusa
from drafters.training.batches import Batch, epoch, load_batch
from drafters.training.checkpoint import load_checkpoint, save_checkpoint, saved_state
from drafters.training.corpus import Corpus
from drafters.training.distill import Distillation, collect
from drafters.training.eagle import HeadOptions
from drafters.training.fit import Schedule, warm_cosine
from drafters.training.medusa import MedusaOptions
from drafters.training.unroll import Outcome, Unrolled, acceptance_lengths
from tests.heads import slow_draft
from tests.tiny import EOS, VOCABULARY, tiny_model, tiny_tokenizer

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    # Weak layers and a sure choice of tokens, so that a head of one layer can learn what comes next.
    model = tiny_model("llama", initializer_range=0.15)
    model.get_output_embeddings().weight.data.mul_(4)
    return LoadedModel(model, tiny_tokenizer(), "tiny", "memory")


@pytest.fixture(scope="module")
def backend(target: LoadedModel) -> LocalBackend:
    return LocalBackend(target.model, target.tokenizer, name="tiny", eos=[EOS], slots=16, capacity=128)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Distillation:
    file = tmp_path_factory.mktemp("questions") / "questions.txt"
    file.write_text("\n".join(f"Question {i}?" for i in range(20)), encoding="utf-8")
    return Distillation(
        model="tiny",
        sequences=24,
        questions=(str(file),),
        held_out=str(file),
        held_out_limit=4,
        max_prompt_tokens=8,
        max_new_tokens=20,
    )


@pytest.fixture(scope="module")
def data(options: Distillation, backend: LocalBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "SHARD", 8)
        collect(options, folder, backend)
    return folder


@pytest.fixture(scope="module")
def corpora(data: Path, target: LoadedModel) -> tuple[Corpus, Corpus]:
    corpus, held_out = Corpus(data, LAYERS), Corpus(data, LAYERS, held_out=True)
    corpus.prepare(target.model)
    held_out.prepare(target.model)
    return corpus, held_out


def test_answers_are_the_targets_own_and_held_out_questions_are_not_among_them(
    data: Path, target: LoadedModel, corpora: tuple[Corpus, Corpus]
) -> None:
    corpus, held_out = corpora
    assert len(corpus.shards) == 3 and len(corpus.documents) >= 20 and len(held_out.documents) == 4
    for document in (*corpus.documents[:5], *held_out.documents):
        choices = target.model(document.tokens[None]).logits[0].argmax(-1)
        assert torch.equal(choices[document.prompt - 1 : -1], document.tokens[document.prompt :])
    texts = [
        bytes(t for t in d.tokens[: d.prompt].tolist() if t < 256).decode(errors="replace") for d in corpus.documents
    ]
    asked = [text for text in texts if "Question" in text]
    assert len(asked) == 16 and not any(f"Question {i}?" in text for i in range(4) for text in asked)


def test_an_interrupted_collection_goes_on_and_other_options_are_refused(
    options: Distillation, backend: LocalBackend, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "SHARD", 8)
    shard = data / "shard-00002.safetensors"
    before, stamp = shard.read_bytes(), (data / "shard-00001.safetensors").stat().st_mtime_ns
    shard.unlink()
    collect(options, data, backend)
    assert shard.read_bytes() == before
    assert (data / "shard-00001.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(RecordError, match="max_new_tokens=20, not 21"):
        collect(Distillation(**{**options.__dict__, "max_new_tokens": 21}), data, backend)


def test_states_are_those_of_a_plain_forward_pass(corpora: tuple[Corpus, Corpus], target: LoadedModel) -> None:
    corpus, _ = corpora
    for document in corpus.documents[:: len(corpus.documents) // 4]:
        states = corpus.states(document)
        plain = target.model(document.tokens[None], output_hidden_states=True)
        for i, layer in enumerate(LAYERS):
            assert torch.allclose(states.features[:, i].float(), plain.hidden_states[layer][0], atol=2e-3, rtol=2e-3)
        logits = states.final.float() @ target.model.get_output_embeddings().weight.T
        assert torch.allclose(logits[document.prompt :], plain.logits[0, document.prompt :], atol=0.05)
        assert torch.equal(states.greedy[document.prompt : -1], document.tokens[document.prompt + 1 :])


def random_head(corpus: Corpus, target: LoadedModel, draft_vocab: int = 100) -> Eagle3Head:
    return eagle.new_head(target.model, corpus, HeadOptions(draft_vocab=draft_vocab), LAYERS, "tiny", seed=1)


def unrolled(head: Eagle3Head, target: LoadedModel, steps: int) -> Unrolled:
    weights = embeddings_of(target.model), target.model.get_output_embeddings().weight
    return Unrolled(head, *weights, steps=steps, decay=0.8, positions=64)


@torch.no_grad()
def test_unrolling_sees_what_drafting_token_by_token_sees(corpora: tuple[Corpus, Corpus], target: LoadedModel) -> None:
    corpus, _ = corpora
    head, steps = random_head(corpus, target), 4
    documents = sorted(corpus.documents, key=len)[:: len(corpus.documents) // 3]
    batch = load_batch(corpus, documents)
    module = unrolled(head, target, steps)
    outcome = module(batch)
    embeddings = embeddings_of(target.model)
    loss = torch.zeros(steps)
    taught = torch.zeros(steps)
    for row, document in enumerate(documents):
        states = corpus.states(document)
        for place in range(document.supervised):
            at = document.prompt - 1 + place
            here = min(steps, document.supervised - place)
            text = document.tokens.tolist()
            path = text[at + 2 : at + 1 + here]
            drafted = slow_draft(head, embeddings, text[: at + 2], states.features.float(), path)
            for step, logits in enumerate(drafted):
                choice = states.greedy[at + 1 + step]
                assert outcome.hits[step, row, place] == (head.tokens[logits.argmax()] == choice)
                if head.t2d[choice]:
                    wanted = target.model.get_output_embeddings().weight @ states.final[at + 1 + step].float()
                    loss[step] -= (wanted[head.tokens].softmax(-1) * logits.log_softmax(-1)).sum()
                    taught[step] += 1
    expected = sum(0.8**step * loss[step] / taught[step] for step in range(steps))
    assert taught.min() > 0 and not head.t2d.all()
    assert outcome.loss.item() == pytest.approx(float(expected), rel=1e-4)


def test_acceptance_length_walks_from_pass_to_pass() -> None:
    hits = torch.tensor([[[1, 1, 0, 0, 1, 1]], [[1, 0, 1, 1, 1, 0]]], dtype=torch.bool)  # two steps, one text
    # at 0: both hit, 3 tokens; at 3: the first misses, 1 token; at 4: both, 3 tokens
    assert acceptance_lengths(hits, [6]) == [3, 1, 3]
    assert acceptance_lengths(hits, [3]) == [3]


def test_every_epoch_holds_every_document_once_in_an_order_of_its_own(corpora: tuple[Corpus, Corpus]) -> None:
    documents = corpora[0].documents
    first, again, second = (epoch(documents, 4, 7, number) for number in (0, 0, 1))
    assert first == again and first != second
    for batches in (first, second):
        flat = sorted(documents.index(d) for members in batches for d in members)
        assert flat == list(range(len(documents)))


SCHEDULE = Schedule(epochs=12, batch=4, learning_rate=3e-3, evaluate_every=100, save_every=5)


def train(target: LoadedModel, data: Path, folder: Path, schedule: Schedule = SCHEDULE) -> fit.Run:
    return eagle.train(target, HeadOptions(draft_vocab=VOCABULARY, layers=LAYERS), schedule, data, folder)


def test_a_head_learns_and_an_interrupted_run_ends_in_the_same_state(
    target: LoadedModel, data: Path, corpora: tuple[Corpus, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(target, data, tmp_path / "whole")
    untrained = fit.validate(
        unrolled(random_head(corpora[0], target, VOCABULARY), target, 3), corpora[0], SCHEDULE, 0, torch.device("cpu")
    )
    whole = read_head(tmp_path / "whole" / "head", 3)
    trained = fit.validate(unrolled(whole, target, 3), corpora[0], SCHEDULE, 0, torch.device("cpu"))
    assert run.steps == run.total == 12 * -(-len(corpora[0].documents) // 4)
    assert trained.loss < 0.85 * untrained.loss
    assert trained.acceptance_length > untrained.acceptance_length + 0.1

    forward, calls = Unrolled.forward, []

    def failing(self: Unrolled, batch: Batch, steps: int | None = None) -> Outcome:
        calls.append(1)
        if len(calls) == 18:
            raise KeyboardInterrupt
        return forward(self, batch, steps)

    monkeypatch.setattr(Unrolled, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        train(target, data, tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "checkpoint" / "run.json").read_text())["steps"] == 15
    resumed = train(target, data, tmp_path / "parts")
    assert len(calls) < 18 + run.total, "it started again instead of going on"
    assert resumed == run
    parts = read_head(tmp_path / "parts" / "head", 3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_a_checkpoint_is_there_wherever_saving_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second save is killed before and within each of the things that it does to files, one after the other."""
    left = 0

    def killed(kind: Any, name: str, half: Callable[..., None] | None = None) -> None:
        whole = getattr(kind, name)

        def act(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if half is not None:
                    half(*args)
                raise KeyboardInterrupt
            return whole(*args, **options)

        monkeypatch.setattr(kind, name, act)

    def first_file_only(folder: Path) -> None:
        for file in sorted(folder.iterdir())[:1] if folder.exists() else ():
            file.unlink()

    for name in ("unlink", "rename", "replace"):
        killed(Path, name)
    killed(shutil, "rmtree")
    killed(shutil, "rmtree", half=first_file_only)
    killed(Accelerator, "save_state", half=lambda _, folder: Path(folder).mkdir())

    module, accelerator = nn.Linear(2, 2), Accelerator()
    found: list[Any] = []
    accelerator.prepare(module)
    for cut in itertools.count(1):
        folder = tmp_path / str(cut)
        for number in (1, 2):
            nn.init.constant_(module.weight, number)
            left = cut if number == 2 else 0
            with contextlib.suppress(KeyboardInterrupt):
                save_checkpoint(accelerator, folder, {"number": number})
        finished, left = left > 0, 0
        found.append(saved_state(accelerator, folder, itemgetter("number")))
        load_checkpoint(accelerator, folder)
        assert module.weight.unique().tolist() == [found[-1]], cut
        save_checkpoint(accelerator, folder, {"number": 3})
        assert saved_state(accelerator, folder, itemgetter("number")) == 3
        if finished:
            break
    assert found == sorted(found) and found[0] == 1 and found[-2:] == [2, 2] and len(found) > 6
    assert saved_state(accelerator, tmp_path / "none", dict) is None


def test_what_a_killed_save_leaves_is_not_taken_for_a_checkpoint(
    tmp_path: Path, kill_in_save: Callable[[int], None]
) -> None:
    accelerator = Accelerator()
    accelerator.prepare(nn.Linear(2, 2))
    save_checkpoint(accelerator, tmp_path, {"number": 1})
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "checkpoint.new")  # complete, and never put in place
    kill_in_save(1)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(accelerator, tmp_path, {"number": 2})
    assert saved_state(accelerator, tmp_path, dict) == {"number": 1}
    shutil.rmtree(tmp_path / "checkpoint")
    assert saved_state(accelerator, tmp_path, dict) is None


def test_a_run_of_other_options_is_not_resumed(target: LoadedModel, data: Path, tmp_path: Path) -> None:
    once, options = Schedule(epochs=1, batch=16), HeadOptions(draft_vocab=100, layers=LAYERS)
    eagle.train(target, options, once, data, tmp_path)
    with pytest.raises(RecordError, match=r"epochs=1, not 2"):
        eagle.train(target, options, Schedule(epochs=2, batch=16), data, tmp_path)
    for other, cause in (
        (replace(options, steps=7, decay=0.1), r"steps=3, not 7"),
        (replace(options, layers=(1, 3)), r"layers=\[1, 2\], not \[1, 3\]"),
        (replace(options, draft_vocab=120), r"draft_vocab=100, not 120"),
        (replace(options, intermediate=48), r"intermediate=0, not 48"),
    ):
        with pytest.raises(RecordError, match=cause):
            eagle.train(target, other, once, data, tmp_path)
    with pytest.raises(RecordError, match=r"kind='eagle3', not 'medusa'"):
        medusa.train(target, MedusaOptions(draft_vocab=100), once, data, tmp_path)
    with pytest.raises(RecordError, match=r"target='tiny', not 'other'"):
        eagle.train(replace(target, name="other"), options, once, data, tmp_path)
    again = eagle.train(target, options, once, data, tmp_path)
    assert again.steps == again.total, "with the same options it goes on"
    with pytest.raises(InvalidRequest, match="warmup"):
        Schedule(warmup=-3)
    card = (tmp_path / "head" / "README.md").read_text(encoding="utf-8")
    assert "held-out acceptance length" in card and "tiny" in card


def test_parameters_that_are_the_targets_stay_as_they_are(target: LoadedModel, corpora: tuple[Corpus, Corpus]) -> None:
    module: nn.Module = unrolled(random_head(corpora[0], target), target, 2)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"head"}


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_last() -> None:
    rates = [warm_cosine(step, 100, warmup=0.1, last=0.05) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx((1 + 0.05) / 2) and rates[100] == pytest.approx(0.05)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert warm_cosine(0, 1, warmup=0.0, last=0.1) == 1, "a run of one step learns at full speed"
