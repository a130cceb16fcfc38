"""The Medusa drafter and the training of its heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from decoding import drafting, generate
from decoding.backends.local import LocalBackend
from decoding.errors import InvalidRequest, ModelError
from decoding.models import LoadedModel
from decoding.strategies.speculative import Speculative, SpeculativeDecoder
from decoding.types import SamplingParams
from drafters.heads.eagle import default_layers
from drafters.heads.medusa import MedusaConfig, MedusaHeads, read_medusa, write_medusa
from drafters.medusa import Medusa
from drafters.training import distill, fit, medusa
from drafters.training.corpus import Corpus
from drafters.training.distill import Distillation, collect
from drafters.training.fit import Schedule
from drafters.training.medusa import MedusaLoss, MedusaOptions
from tests.greedy import greedy_reference, run
from tests.test_drafters import accepted
from tests.test_eagle3 import small_backend, small_prompts
from tests.tiny import EOS, tiny_model, tiny_tokenizer


def random_heads(layers: int = 3, vocab: int = 12) -> MedusaHeads:
    heads = MedusaHeads(MedusaConfig(3, 9, 32, vocab, layers, "tiny"))
    generator = torch.Generator().manual_seed(4)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    heads.tokens.copy_(torch.tensor([0, 1, 3, 4, 6, 7, 8, 10, 11]))
    return heads.half().float().eval()


@pytest.mark.parametrize("nodes", [0, 6], ids=["chain", "tree"])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "ragged batch"])
def test_greedy_tokens_equal_plain_decoding(nodes: int, together: bool, tmp_path: Path) -> None:
    backend = small_backend()
    write_medusa(random_heads(), tmp_path)
    drafter = Medusa(str(tmp_path), nodes=nodes)
    drafter.attach(backend)
    decoder = SpeculativeDecoder(drafter, 3)
    inputs = small_prompts(8)
    batches = [inputs] if together else [[prompt] for prompt in inputs]
    params = SamplingParams(max_new_tokens=16)
    results = [s for batch in batches for s in run(backend.engine, [(p, decoder) for p in batch], params)]
    assert [s.error for s in results] == [None] * 8
    assert [s.new_tokens for s in results] == [greedy_reference(backend.model, p, 16) for p in inputs]
    assert accepted(results) > 0 and any(s.reused for s in results)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_guesses_are_what_the_heads_say_of_the_last_hidden_state(temperature: float, tmp_path: Path) -> None:
    backend = small_backend()
    heads = random_heads()
    write_medusa(heads, tmp_path)
    drafter = Medusa(str(tmp_path))
    drafter.attach(backend)
    params = SamplingParams(max_new_tokens=9, temperature=temperature, seed=3)
    sequence = backend.engine.submit(small_prompts(1)[0], params, SpeculativeDecoder(drafter, 3))
    compared = 0
    while backend.engine.busy:
        if len(sequence.tokens) > len(sequence.prompt):
            (draft,) = drafter.propose([sequence], [3])
            with torch.no_grad():
                ids = torch.tensor([sequence.tokens[:-1]])
                logits = heads(backend.model.get_decoder()(ids).last_hidden_state[0, -1])
            if temperature:
                assert draft.probabilities is not None
                expected = torch.zeros(3, 12)
                expected[:, heads.tokens] = (logits / temperature).softmax(-1)
                assert torch.allclose(draft.probabilities, expected, atol=1e-4)
            else:
                assert draft.block.tokens == heads.tokens[logits.argmax(-1)].tolist()
            compared += 1
        backend.engine.step()
    assert compared > 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("nodes", [0, 6], ids=["chain", "tree"])
def test_heads_that_say_nan_are_left_out(
    nodes: int, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = small_backend()
    write_medusa(random_heads(), tmp_path)
    said = MedusaHeads.forward
    only_first = torch.tensor([1.0, torch.nan, torch.nan])[:, None]
    monkeypatch.setattr(MedusaHeads, "forward", lambda self, hidden: said(self, hidden) * only_first)
    params = SamplingParams(max_new_tokens=12, temperature=temperature, seed=3, ignore_eos=True)
    for length in (3, None):
        strategy = Speculative(drafter=Medusa(str(tmp_path), nodes=nodes), draft_length=length)
        answers = generate(small_prompts(4), backend, strategy=strategy, params=params)
        assert [a.error for a in answers] == [None] * 4
        assert max(step.drafted for a in answers for step in a.trace) <= (nodes or 1), "the second head says nothing"
        assert [len(a.tokens) for a in answers] == [12] * 4


def test_a_tree_holds_the_likeliest_branches(tmp_path: Path) -> None:
    heads = random_heads()
    write_medusa(heads, tmp_path)
    drafter = Medusa(str(tmp_path), nodes=9)
    drafter.attach(small_backend())
    logits = torch.tensor([[3.0, 2, 1, 0, 0, 0, 0, 0, 0], [1.0, 4, 0, 0, 0, 0, 0, 0, 0]])
    draft = drafter._tree(logits)
    chance = logits.softmax(-1)
    branches: dict[tuple[int, ...], float] = {(int(heads.tokens[i]),): float(chance[0, i]) for i in range(9)}
    branches |= {
        (int(heads.tokens[i]), int(heads.tokens[k])): float(chance[0, i] * chance[1, k])
        for i in range(9)
        for k in range(9)
    }
    paths: list[tuple[int, ...]] = []
    assert draft.block.parents is not None and draft.confidence is not None
    for token, parent in zip(draft.block.tokens, draft.block.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    best = sorted(branches.values(), reverse=True)[:9]
    assert len(set(paths)) == 9 and sorted((branches[p] for p in paths), reverse=True) == pytest.approx(best)


def test_heads_for_another_model_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    write_medusa(random_heads(layers=5), tmp_path)
    with pytest.raises(ModelError, match="5 layers"):
        Medusa(str(tmp_path)).attach(small_backend())
    stray = random_heads()
    stray.tokens[3] = 12
    write_medusa(stray, tmp_path)
    with pytest.raises(ModelError, match="outside their vocabulary"):
        Medusa(str(tmp_path)).attach(small_backend())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or cut short"):
        read_medusa(tmp_path)
    with pytest.raises(InvalidRequest, match="medusa needs nodes"):
        drafting.find("medusa(nodes=-2)")


def test_training_lowers_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "SHARD", 16)
    model = tiny_model("llama", initializer_range=0.15)
    model.get_output_embeddings().weight.data.mul_(4)
    backend = LocalBackend(model, tiny_tokenizer(), name="tiny", eos=[EOS], slots=16, capacity=96)
    (tmp_path / "q.txt").write_text("\n".join(f"Question {i}?" for i in range(20)), encoding="utf-8")
    asked = str(tmp_path / "q.txt")
    collect(
        Distillation("tiny", sequences=16, questions=(asked,), held_out=asked, held_out_limit=4, max_new_tokens=16),
        tmp_path / "data",
        backend,
    )
    target = LoadedModel(model, tiny_tokenizer(), "tiny", "memory")
    options = MedusaOptions(heads=3, draft_vocab=200)
    schedule = Schedule(epochs=30, batch=4, learning_rate=1e-2, evaluate_every=1000)
    medusa.train(target, options, schedule, tmp_path / "data", tmp_path / "run")
    corpus = Corpus(tmp_path / "data", default_layers(3))
    before, after = (
        fit.validate(
            MedusaLoss(heads, model.get_output_embeddings().weight, options.decay), corpus, schedule, 0, model.device
        )
        for heads in (medusa.new_heads(target, corpus, options), read_medusa(tmp_path / "run" / "head"))
    )
    assert after.loss < 0.85 * before.loss
    assert after.acceptance_length > before.acceptance_length + 0.05
