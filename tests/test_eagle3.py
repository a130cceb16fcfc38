"""The EAGLE-3 drafter: what it drafts, that answers stay the model's, and the heads it loads."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence as List
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config

import decoding
from decoding import drafting
from decoding.backends.local import LocalBackend
from decoding.drafting import Draft, Drafter
from decoding.engine.runner import embeddings as embeddings_of
from decoding.engine.sequence import Sequence
from decoding.errors import InvalidRequest, ModelError
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.speculative import SpeculativeDecoder
from decoding.types import SamplingParams
from drafters.eagle3 import Eagle3
from drafters.heads import fitting
from drafters.heads.checkpoint import read_head, write_head
from drafters.heads.eagle import Eagle3Head, Rotation
from drafters.heads.joined import JoinedLayer
from drafters.heads.session import Session
from tests.greedy import greedy_reference, run
from tests.heads import SMALL, random_head, slow_draft
from tests.test_drafters import KeepsTheFirstGuess, accepted, chi_square
from tests.tiny import tiny_model, tiny_tokenizer

CHAIN, TREE = "chain", "tree"


def small_backend(kind: str = "llama", slots: int = 8, **options: Any) -> LocalBackend:
    model = tiny_model(kind, **SMALL | options)
    return LocalBackend(model, tiny_tokenizer(), name="tiny", slots=slots, capacity=96)


def small_prompts(count: int, vocab: int = 12) -> list[list[int]]:
    random = np.random.default_rng(5)
    common = random.integers(0, vocab, 20).tolist()  # some begin alike, so that prefixes are reused
    own = [random.integers(0, vocab, random.integers(2, 30)).tolist() for _ in range(count)]
    return [common + rest if i % 2 else rest for i, rest in enumerate(own)]


class Recorded(Eagle3):
    """Keeps what it was asked and what it proposed."""

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        drafts = super().propose(sequences, lengths)
        if not hasattr(self, "log"):
            self.log: list[tuple[list[int], int, Draft]] = []
        self.log += [(list(s.tokens), n, d) for s, n, d in zip(sequences, lengths, drafts, strict=True)]
        return drafts


def recorded(folder: Path, backend: LocalBackend, shape: str) -> Recorded:
    drafter = Recorded(str(folder), nodes=7 if shape == TREE else 0, top_k=3)
    drafter.attach(backend)
    return drafter


@pytest.mark.parametrize("shape", [CHAIN, TREE])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "ragged batch"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_greedy_tokens_equal_plain_decoding(kind: str, together: bool, shape: str, tmp_path: Path) -> None:
    backend = small_backend(kind)
    write_head(random_head(backend.model), tmp_path)
    decoder = SpeculativeDecoder(recorded(tmp_path, backend, shape), 4)
    inputs = small_prompts(8)
    expected = [greedy_reference(backend.model, prompt, 16) for prompt in inputs]
    params = SamplingParams(max_new_tokens=16, ignore_eos=True)
    batches = [inputs] if together else [[prompt] for prompt in inputs]
    results = [s for batch in batches for s in run(backend.engine, [(p, decoder) for p in batch], params)]
    assert [s.error for s in results] == [None] * 8
    assert [s.new_tokens for s in results] == expected
    assert accepted(results) > 0, "no guess was ever accepted, so nothing was tested"
    assert any(s.reused for s in results), "no prefix was ever reused"


@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_a_prompt_of_one_token_is_answered_as_by_plain_decoding(shape: str, tmp_path: Path) -> None:
    backend = small_backend(slots=2)
    write_head(random_head(backend.model), tmp_path)
    drafter = recorded(tmp_path, backend, shape)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    for token in range(3):  # more than there are slots
        (sequence,) = run(backend.engine, [([token], SpeculativeDecoder(drafter, 4))], params)
        assert sequence.error is None and sequence.new_tokens == greedy_reference(backend.model, [token], 12)
    assert any(draft.block for _, _, draft in drafter.log)
    assert drafter._session.cache.free == 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("levels", [0, 1])
@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_drafts_end_where_the_head_says_nan(
    shape: str, levels: int, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = small_backend()
    write_head(random_head(backend.model), tmp_path)
    for name in ("guess", "read")[: 2 - levels]:
        said = getattr(Session, name)
        monkeypatch.setattr(
            Session,
            name,
            lambda *given, said=said: replace(level := said(*given), logits=torch.full_like(level.logits, torch.nan)),
        )
    params = SamplingParams(max_new_tokens=12, temperature=temperature, seed=2, ignore_eos=True)
    plain = [s.tokens for s in decoding.generate(small_prompts(4), backend, params=params)]
    for length in (3, None):
        strategy = decoding.Speculative(drafter=recorded(tmp_path, backend, shape), draft_length=length)
        answers = decoding.generate(small_prompts(4), backend, strategy=strategy, params=params)
        assert [a.error for a in answers] == [None] * 4
        assert max(step.drafted for a in answers for step in a.trace) <= levels * (3 if shape == TREE else 1)
        assert [a.tokens for a in answers] == plain or (temperature and levels and shape == CHAIN)


@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_drafts_are_what_the_head_says_of_a_plain_forwards_hidden_states(shape: str, tmp_path: Path) -> None:
    backend = small_backend()
    head = random_head(backend.model)
    write_head(head, tmp_path)
    drafter = recorded(tmp_path, backend, shape)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    sequences = run(backend.engine, [(p, SpeculativeDecoder(drafter, 4)) for p in small_prompts(6)], params)
    assert [s.error for s in sequences] == [None] * 6 and any(s.reused for s in sequences)
    embeddings = embeddings_of(backend.model)
    asked = [entry for entry in drafter.log if entry[1]]
    for text, length, draft in asked[::3]:
        with torch.no_grad():
            states = backend.model(torch.tensor([text]), output_hidden_states=True).hidden_states
        features = torch.stack([states[layer][0] for layer in head.config.layers], dim=1)
        assert draft.confidence is not None and 0 < len(draft.block) == len(draft.confidence)
        parents = draft.block.parents or range(-1, len(draft.block) - 1)
        paths: list[list[int]] = []
        scores: list[float] = []
        for token, parent, confidence in zip(draft.block.tokens, parents, draft.confidence, strict=True):
            above = paths[parent] if parent >= 0 else []
            said = slow_draft(head, embeddings, text, features, above)[-1].softmax(-1)
            at = head.tokens.tolist().index(token)
            assert confidence == pytest.approx(float(said[at]), abs=1e-4)
            if shape == CHAIN:
                assert at == int(said.argmax())
            paths.append([*above, token])
            scores.append((scores[parent] if parent >= 0 else 1.0) * confidence)
        assert max(map(len, paths)) <= length
        if shape == TREE:
            assert len(paths) == (7 if length > 1 else 3) == len({tuple(path) for path in paths})
            first = slow_draft(head, embeddings, text, features, [])[-1].softmax(-1).topk(3)
            for chance, index in zip(first.values.tolist(), first.indices.tolist(), strict=True):
                if [int(head.tokens[index])] not in paths:
                    assert chance <= min(scores) + 1e-4, "a likelier guess was left out"
    assert any(len(draft.block) > 1 for _, _, draft in drafter.log)


def test_a_step_is_the_same_whichever_slots_are_drafted_for(tmp_path: Path) -> None:
    """Slots of a range are read where they lie, in any order of the sequences, others are gathered."""
    backend = small_backend()
    write_head(random_head(backend.model), tmp_path)
    drafter = recorded(tmp_path, backend, TREE)
    decoder = SpeculativeDecoder(drafter, 3)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    sequences = [backend.engine.submit(prompt, params, decoder) for prompt in small_prompts(4)]
    for _ in range(4):
        backend.engine.step()
    alone = [drafter.propose([sequence], [3])[0] for sequence in sequences]
    for members in ([0, 1, 2, 3], [3, 1, 0, 2], [3, 0], [0, 2]):
        drafts = drafter.propose([sequences[i] for i in members], [3] * len(members))
        for i, draft in zip(members, drafts, strict=True):
            assert draft.block == alone[i].block
            assert draft.confidence == pytest.approx(alone[i].confidence, abs=1e-5)


def test_a_head_that_missed_the_prompt_does_no_harm(tmp_path: Path) -> None:
    """The drafter is attached while a sequence runs, whose past has no hidden states."""
    backend = small_backend()
    write_head(random_head(backend.model), tmp_path)
    prompt = small_prompts(2)[1]
    plain = backend.engine.submit(prompt, SamplingParams(max_new_tokens=16), AutoregressiveDecoder())
    backend.engine.step()
    decoder = SpeculativeDecoder(recorded(tmp_path, backend, CHAIN), 4)
    late = backend.engine.submit(prompt, SamplingParams(max_new_tokens=16), decoder)
    while backend.engine.busy:
        backend.engine.step()
    assert late.reused == 0, "a prefix without hidden states was reused"
    assert plain.new_tokens == late.new_tokens == greedy_reference(backend.model, prompt, 16)


def sampled_outcomes(folder: Path, decoder: type[SpeculativeDecoder], requests: int) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected counts of every answer of four of four tokens at temperature 1."""
    new, prompt = 4, [1, 2, 3, 1, 2]
    backend = small_backend(slots=64, vocab_size=4, initializer_range=0.15)
    write_head(random_head(backend.model, draft_vocab=3), folder)
    drafter = recorded(folder, backend, CHAIN)
    speculative = decoder(drafter, 2)
    sequences = [
        backend.engine.submit(prompt, SamplingParams(temperature=1.0, max_new_tokens=new, seed=seed), speculative)
        for seed in range(requests)
    ]
    while backend.engine.busy:
        backend.engine.step()
    drafted = sum(step.drafted for s in sequences for step in s.trace)
    assert drafted > requests and 0 < accepted(sequences) < drafted
    assert all(d.probabilities is not None for _, _, d in drafter.log if d.block), "the chain was not sampled"
    answers = torch.tensor(list(itertools.product(range(4), repeat=new)))
    with torch.no_grad():
        logits = backend.model(torch.cat([torch.tensor([prompt] * len(answers)), answers], dim=1)).logits
    chances = logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    expected = chances.gather(2, answers[..., None])[..., 0].sum(-1).exp().numpy() * requests
    cells = np.array([s.new_tokens for s in sequences]) @ (4 ** np.arange(new - 1, -1, -1))
    return np.bincount(cells, minlength=len(answers)), expected


def test_a_sampled_chain_keeps_the_models_distribution(tmp_path: Path) -> None:
    assert chi_square(*sampled_outcomes(tmp_path / "a", SpeculativeDecoder, 2000)) > 1e-4
    assert chi_square(*sampled_outcomes(tmp_path / "b", KeepsTheFirstGuess, 800)) < 1e-6


def test_sampled_guesses_come_from_the_heads_distribution_with_the_requests_filters(tmp_path: Path) -> None:
    backend = small_backend(slots=64)
    head = random_head(backend.model)
    write_head(head, tmp_path)
    drafter = recorded(tmp_path, backend, CHAIN)
    params = SamplingParams(temperature=0.7, top_k=4, max_new_tokens=3)
    prompt = small_prompts(1)[0]
    for seed in range(300):
        backend.engine.submit(prompt, params.but(seed=seed), SpeculativeDecoder(drafter, 1))
    while backend.engine.busy:
        backend.engine.step()
    drawn: dict[tuple[int, ...], list[Draft]] = {}
    for text, _, draft in drafter.log:
        if draft.block:
            drawn.setdefault(tuple(text), []).append(draft)
    chosen, drafts = max(drawn.items(), key=lambda pair: len(pair[1]))
    with torch.no_grad():
        states = backend.model(torch.tensor([chosen]), output_hidden_states=True).hidden_states
    features = torch.stack([states[layer][0] for layer in head.config.layers], dim=1)
    logits = slow_draft(head, embeddings_of(backend.model), list(chosen), features, [])[-1] / 0.7
    logits[logits < logits.topk(4).values[-1]] = -torch.inf
    expected = torch.zeros(12)
    expected[head.tokens] = logits.softmax(-1)
    for draft in drafts:
        assert draft.probabilities is not None
        assert torch.allclose(draft.probabilities[0], expected, atol=1e-4)
    counts = np.bincount([draft.block.tokens[0] for draft in drafts], minlength=12)
    assert len(drafts) > 50 and (counts[expected.numpy() == 0] == 0).all() and (counts > 0).sum() > 1


def same_head(one: Eagle3Head, other: Eagle3Head) -> None:
    tokens = torch.arange(6) * 5 % 12
    features = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(3))
    embeddings = torch.randn(12, 32, generator=torch.Generator().manual_seed(4))
    a, b = (slow_draft(head, embeddings, tokens.tolist(), features, [3, 1]) for head in (one, other))
    assert torch.equal(one.tokens, other.tokens) and torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("flag", ["", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
def test_a_written_head_is_read_back(flag: str, tmp_path: Path) -> None:
    head = random_head(tiny_model(**SMALL), **({flag: True} if flag else {}))
    write_head(head, tmp_path)
    same_head(head, read_head(tmp_path, 3))
    assert read_head(tmp_path, 3).config.layers == (1, 2)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["speculators_model_type"] == "eagle3" and "speculators_config" in values
    assert {"layers.0.hidden_norm.weight", "d2t", "t2d"} <= load_file(tmp_path / "model.safetensors").keys()


def test_a_head_of_the_whole_vocabulary_needs_no_maps(tmp_path: Path) -> None:
    head = random_head(tiny_model(**SMALL), draft_vocab=12)
    write_head(head, tmp_path)
    assert "d2t" not in load_file(tmp_path / "model.safetensors")
    same_head(head, read_head(tmp_path, 3))


def test_safeailabs_layout_is_read(tmp_path: Path) -> None:
    head = random_head(tiny_model(num_hidden_layers=6, **SMALL))
    head.config = head.config.__class__(**{**head.config.__dict__, "layers": (2, 3)})
    layer = head.config.layer
    values = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_theta": 5000.0,
        "vocab_size": 12,
        "draft_vocab_size": 9,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    weights = {name.replace("layers.0.", "midlayer."): t.clone() for name, t in head.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        read_head(tmp_path, 6)
    save_file(weights, tmp_path / "model.safetensors")
    found = read_head(tmp_path, 6)
    assert found.config.layers == (2, 3)  # a low, a middle and a high one of six, which are two
    same_head(head, found)


@pytest.mark.parametrize("kind", ["llama", "llama with biases", "qwen3"])
def test_the_joined_layer_computes_what_the_layer_does(kind: str) -> None:
    config = random_head(tiny_model(**SMALL)).config
    sizes = {name: getattr(config.layer, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    if "biases" in kind:
        sizes |= {"attention_bias": True, "mlp_bias": True}
    layer = Qwen3Config(**sizes) if kind == "qwen3" else LlamaConfig(**sizes)
    torch.manual_seed(0)
    head = Eagle3Head(replace(config, layer=layer)).requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    joined, rotate = JoinedLayer(head, 32), Rotation(head.config, 32, torch.device("cpu"))
    embedding, hidden, attended = torch.randn(2, 3, 32), torch.randn(2, 3, 32), torch.randn(2, 3, 4, 8)
    at = torch.tensor([[0, 5, 9], [31, 2, 2]])
    both, residual = head.layer.enter(embedding, hidden)
    key, value = head.layer.self_attn.key_value(both)
    expected = (rotate(head.layer.self_attn.query(both), at), rotate(key, at), value, residual)
    for ours, theirs in zip(joined.enter(embedding, hidden, at), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(joined.leave(residual, attended), head.layer.leave(residual, attended), atol=1e-5)
    assert not torch.allclose(joined.enter(embedding, hidden, at + 1 - at)[0], expected[0], atol=1e-3)


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-500])
    elif how == "no header":
        file.write_bytes(b"\0" * 200)
    elif how == "missing":
        del weights["fc.weight"]
        save_file(weights, file)
    elif how == "misshapen":
        weights["norm.weight"] = weights["norm.weight"][:-1].clone()
        save_file(weights, file)
    elif how == "not finite":
        weights["norm.weight"][0] = float("nan")
        save_file(weights, file)
    elif how == "strange tokens":
        weights["d2t"][-1] = 99
        save_file(weights, file)
    elif how == "strange layer":
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "eagle_aux_hidden_state_layer_ids": [1, 9]}))
    elif how == "no weights":
        file.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad config":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut short", "damaged or cut short"),
        ("no header", "damaged or cut short"),
        ("missing", "fc.weight"),
        ("misshapen", "norm.weight is misshapen"),
        ("not finite", "norm.weight .* damaged"),
        ("strange tokens", "outside its vocabulary"),
        ("strange layer", "layer 9, and the model has 3 layers"),
        ("no weights", "holds no weights"),
        ("no config", "no config.json"),
        ("bad config", "cannot be read"),
    ],
)
def test_a_damaged_head_is_refused(how: str, says: str, tmp_path: Path) -> None:
    write_head(random_head(tiny_model(**SMALL)), tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ModelError, match=says):
        read_head(tmp_path, 3)


def test_a_head_for_another_model_is_refused_and_the_model_serves_on(tmp_path: Path) -> None:
    write_head(random_head(tiny_model(**SMALL)), tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_hidden_layers": 4}, "4 layers"),
        ({"vocab_size": 13}, "vocabulary of 13"),
    ]
    for options, says in cases:
        backend = small_backend(**options)
        with pytest.raises(ModelError, match=says):
            Eagle3(str(tmp_path)).attach(backend)
        (out,) = decoding.generate([[1, 2, 3]], backend, params=SamplingParams(max_new_tokens=3))
        assert len(out.tokens) == 3


def test_a_shipped_head_is_found_by_the_models_sizes_and_then_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "SHIPPED", tmp_path)
    backend = small_backend()
    with pytest.raises(ModelError, match=r"no eagle3 head is shipped for tiny.*training\.eagle"):
        Eagle3().attach(backend)
    write_head(random_head(backend.model, seed=1), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**values, "target_model": "another"}))
    assert fitting.shipped_head("eagle3", backend) == tmp_path / "b"
    shutil.rmtree(tmp_path / "b")
    assert fitting.shipped_head("eagle3", backend) == tmp_path / "a"
    params = SamplingParams(max_new_tokens=6)
    strategy = "speculative(drafter=eagle3(nodes=4, top_k=2), draft_length=3)"
    (out,) = decoding.generate([[1, 2, 3]], backend, strategy=strategy, params=params)
    assert out.tokens == greedy_reference(backend.model, [1, 2, 3], 6)
    assert any(step.drafted == 4 for step in out.trace)


@pytest.mark.parametrize("options", ["eagle3(nodes=-1)", "eagle3(top_k=0)", "eagle3(nodes=many)"])
def test_bad_options_are_refused(options: str) -> None:
    with pytest.raises(InvalidRequest, match="eagle3 needs"):
        drafting.find(options)


def test_drafting_has_a_measured_cost_where_steps_have(tmp_path: Path) -> None:
    backend = small_backend()
    write_head(random_head(backend.model), tmp_path)
    drafter: Drafter = Eagle3(str(tmp_path))
    drafter.attach(backend)
    one, three = drafter.cost(1, 1, 50.0), drafter.cost(3, 1, 50.0)
    assert one == three == 0 or 0 < one < three
    tree = Eagle3(str(tmp_path), nodes=7, top_k=3)
    tree.attach(backend)
    assert tree.cost(3, 20, 50.0) > 0, "more sequences than there are slots"


def test_commit_without_verification_is_noticed(tmp_path: Path) -> None:
    """The negative control of the greedy tests: keeping every first guess changes answers."""
    backend = small_backend()
    write_head(random_head(backend.model), tmp_path)
    drafter = recorded(tmp_path, backend, CHAIN)

    inputs = small_prompts(4)
    results = run(
        backend.engine, [(p, KeepsTheFirstGuess(drafter, 4)) for p in inputs], SamplingParams(max_new_tokens=16)
    )
    assert [s.new_tokens for s in results] != [greedy_reference(backend.model, p, 16) for p in inputs]
