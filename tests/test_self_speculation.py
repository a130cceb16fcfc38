"""The target's own layers, and its own weights in fewer bits, guess for it."""

from __future__ import annotations

from collections.abc import Sequence as List

import pytest

from decoding import drafting
from decoding.backends.local import LocalBackend
from decoding.drafting import Draft
from decoding.engine import fused
from decoding.engine.block import Block
from decoding.engine.sequence import Sequence
from decoding.errors import InvalidRequest, ModelError
from decoding.strategies.speculative import SpeculativeDecoder
from decoding.types import SamplingParams
from drafters import LayerSkip, Quantised
from drafters.layer_skip import SelfSpeculation
from tests.greedy import greedy_reference, prompts, run
from tests.test_drafters import KeepsTheFirstGuess, accepted, chi_square, outcomes
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("name", ["layer-skip(layers=1)", "quantised(weights=int4)"])
def test_sampling_from_the_target_itself_keeps_its_distribution(name: str) -> None:
    if name.startswith("quantised") and fused.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    assert chi_square(*outcomes(drafting.find(name), SpeculativeDecoder, 1500, attach=True)) > 1e-4
    assert chi_square(*outcomes(drafting.find("layer-skip(layers=1)"), KeepsTheFirstGuess, 800, attach=True)) < 1e-6


def test_with_drafts_of_a_fixed_length_a_sampled_request_does_not_depend_on_its_neighbours() -> None:
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=4, capacity=64)
    drafter = LayerSkip(layers=1)
    drafter.attach(backend)
    params = SamplingParams(max_new_tokens=16, temperature=1.0, seed=3, ignore_eos=True)
    inputs = prompts(4, seed=2)

    def sample(batch: list[list[int]]) -> list[list[int]]:
        backend.forget()
        results = run(backend.engine, [(prompt, SpeculativeDecoder(drafter, 3)) for prompt in batch], params)
        assert accepted(results) > 0
        return [s.new_tokens for s in results]

    assert [sample([prompt])[0] for prompt in inputs] == sample(inputs)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_layer_skip_guesses_with_the_targets_cache_and_leaves_it_as_it_was(kind: str) -> None:
    model = tiny_model(kind, num_hidden_layers=5) if kind != "gpt2" else tiny_model(kind)
    backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=96)
    inputs = prompts(6, seed=3)
    params = SamplingParams(max_new_tokens=16, ignore_eos=True)
    drafter = LayerSkip(layers=2)
    drafter.attach(backend)
    results = run(backend.engine, [(p, SpeculativeDecoder(drafter, 3)) for p in inputs], params)
    assert [s.error for s in results] == [None] * 6
    assert [s.new_tokens for s in results] == [greedy_reference(model, p, 16) for p in inputs]
    drafted = sum(t.drafted for s in results for t in s.trace)
    assert 0 < accepted(results) < drafted
    with pytest.raises(InvalidRequest, match="layers"):
        LayerSkip(layers=99).attach(backend)


def test_layer_skip_guesses_what_a_model_of_these_layers_says() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    short = tiny_model("llama", num_hidden_layers=2)
    short.load_state_dict(model.state_dict(), strict=False)
    backend = LocalBackend(model, tiny_tokenizer(), slots=2, capacity=64)
    drafter = LayerSkip(layers=2)
    drafter.attach(backend)
    seen: list[tuple[list[int], list[int]]] = []

    class Watched(SpeculativeDecoder):
        def plan(self, sequences: List[Sequence]) -> list[Block]:
            blocks = super().plan(sequences)
            seen.extend((list(s.tokens), list(b.tokens)) for s, b in zip(sequences, blocks, strict=True))
            return blocks

    run(backend.engine, [(prompts(1)[0], Watched(drafter, 3))], SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert sum(len(guesses) for _, guesses in seen) > 3
    for before, guesses in seen:
        assert not guesses or guesses == greedy_reference(short, before, len(guesses))


@pytest.mark.parametrize(("weights", "share"), [("int8", 0.6), ("int4", 0.05)])
def test_a_quantised_copy_guesses_for_its_original_and_is_often_right(weights: str, share: float) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=96)
    if backend.engine.runner.fused is None:
        with pytest.raises(ModelError, match="compiled"):
            Quantised(weights).attach(backend)
        return
    drafter = Quantised(weights)
    drafter.attach(backend)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    inputs = prompts(6, seed=3)
    results = run(backend.engine, [(p, SpeculativeDecoder(drafter, 4)) for p in inputs], params)
    assert [s.new_tokens for s in results] == [greedy_reference(model, p, 24) for p in inputs]
    assert accepted(results) > share * sum(t.drafted for s in results for t in s.trace) > 0
    broken = run(backend.engine, [(p, KeepsTheFirstGuess(drafter, 4)) for p in inputs], params)
    assert [s.new_tokens for s in broken] != [s.new_tokens for s in results]
    assert all(p is q for p, q in zip(model.parameters(), backend.model.parameters(), strict=True))


def test_quantised_drafts_of_several_lengths_are_those_made_level_by_level() -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=96)
    if backend.engine.runner.fused is None:
        pytest.skip("there is no C++ compiler here")
    drafter = Quantised("int8")
    drafter.attach(backend)
    compared: list[int] = []

    class Compared(SpeculativeDecoder):
        def plan(self, sequences: List[Sequence]) -> list[Block]:
            lengths = [1 + (s.id * 3 + len(s.tokens)) % 5 for s in sequences]
            lengths[0] = 0
            at_once, by_level = drafter.propose(sequences, lengths), stepwise(sequences, lengths)
            assert [draft.block for draft in at_once] == [draft.block for draft in by_level]
            for one, other in zip(at_once, by_level, strict=True):
                assert one.confidence == pytest.approx(other.confidence)
            compared.extend(len(draft.block) for draft in at_once)
            return super().plan(sequences)

    def stepwise(sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Quantised, "_guess", SelfSpeculation._guess)
            return drafter.propose(sequences, lengths)

    decoder = Compared(drafter, 2)
    run(backend.engine, [(p, decoder) for p in prompts(4, seed=3)], SamplingParams(max_new_tokens=12))
    assert set(compared) == {0, 1, 2, 3, 4, 5}
