"""Several drafters in one tree, the target's own layers, and draft models of another vocabulary."""

from __future__ import annotations

from collections.abc import Sequence as List
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import decoding
from decoding import drafting
from decoding.backends.local import LocalBackend
from decoding.drafting import Draft, Drafter
from decoding.engine import fused
from decoding.engine.block import Block, Commit
from decoding.engine.sequence import Sequence
from decoding.engine.width import Width
from decoding.errors import InvalidRequest, ModelError, UnknownName
from decoding.strategies.speculative import Speculative, SpeculativeDecoder
from decoding.trace import origins, speculation
from decoding.types import SamplingParams
from drafters import CrossVocabulary, LayerSkip, Mixed, Quantised
from drafters.cross_vocabulary import Translation
from drafters.layer_skip import SelfSpeculation
from drafters.mixed import _Tree
from tests.greedy import greedy_reference, prompts, run
from tests.test_drafters import KeepsTheFirstGuess, accepted, chi_square, outcomes, text
from tests.test_width import Table
from tests.tiny import EOS, VOCABULARY, byte_alphabet, tiny_model, tiny_tokenizer


class Always(Drafter):
    """Guesses the same chain in every place."""

    def __init__(self, name: str, tokens: List[int], confidence: float) -> None:
        self.name = name  # type: ignore[misc]
        self.tokens, self.confidence = list(tokens), confidence

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        return [Draft(Block(self.tokens[:n]), confidence=[self.confidence] * len(self.tokens[:n])) for n in lengths]


def test_equal_guesses_become_one_node_with_both_names() -> None:
    mixed = Mixed([Always("a", [1, 2, 3], 0.5), Always("b", [1, 2, 4], 0.7), Always("c", [5], 0.2)])
    (draft,) = mixed.propose([text([9])], [3])
    assert (list(draft.block.tokens), draft.block.parents) == ([1, 2, 3, 4, 5], [-1, 0, 1, 1, -1])
    assert draft.sources == ["a+b", "a+b", "a", "b", "c"]
    assert draft.confidence == pytest.approx([0.7, 0.7, 0.5, 0.7, 0.2])
    small = Mixed([Always("a", [1, 2, 3], 0.5), Always("b", [1, 2, 4], 0.7), Always("c", [5], 0.2)], nodes=3)
    (few,) = small.propose([text([9])], [3])
    assert (list(few.block.tokens), few.block.parents, few.sources) == ([1, 2, 4], [-1, 0, 1], ["a+b", "a+b", "b"])


def test_a_request_learns_whom_to_trust() -> None:
    """Of two drafters that say the same of themselves, the one that was right is believed, in this request first."""
    mixed = Mixed([Always("liar", [1], 0.8), Always("honest", [2], 0.8)], nodes=1)
    one, other = text([9]), text([9])
    assert mixed.propose([one], [1])[0].sources == ["liar"], "nothing is known yet; the first comes first"
    for _ in range(12):
        mixed.propose([one], [1])
        one.tokens += [2]
        mixed.observe([one], None, [Commit([2])])  # type: ignore[arg-type]
    assert mixed.propose([one], [1])[0].sources == ["honest"]
    assert mixed.propose([other], [1])[0].sources == ["honest"], "what one request taught, the next one starts from"
    mixed.forget(one)
    mixed.unlearn()
    assert mixed.propose([other], [1])[0].sources == ["liar"]


def test_drafts_are_held_against_the_text_even_if_nobody_was_asked_for_a_while() -> None:
    mixed, sequence = Mixed([Always("a", [2], 0.3)]), text([9])
    for _ in range(20):
        mixed.propose([sequence], [1])
        sequence.tokens += [2, 5, 5]  # the last two in steps of which it was not told
    (draft,) = mixed.propose([sequence], [1])
    assert draft.confidence is not None and draft.confidence[0] > 0.8
    mixed.forget(sequence)
    assert not mixed._read


class Dear(Always):
    """Takes little of a step per level, and keeps what it was asked for."""

    stated = False

    trust = 0.97

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        self.asked = list(lengths)
        return super().propose(sequences, lengths)

    def cost(self, levels: int, sequences: int, context: float) -> float:
        self.stated = True
        return 0.005 * levels


def test_a_drafter_that_takes_time_is_not_asked_for_what_others_hold_already() -> None:
    class Sometimes(Always):
        def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
            drafts = super().propose(sequences, lengths)
            return [draft if s.tokens[0] == 1 else Draft() for s, draft in zip(sequences, drafts, strict=True)]

    dear = Dear("dear", [7] * 24, 0.9)
    mixed = Mixed([dear, Sometimes("cheap", [5] * 24, 0.99)])
    mixed.attach(SimpleNamespace(live=Table(1.0, 0.01)))  # type: ignore[arg-type]
    assert dear.stated, "costs may have to be measured, which cannot be done while sequences decode"
    known, unknown = text([1]), text([2])
    mixed._widths[0]._saved_up = 0.0  # no trial is due
    mixed.propose([known, unknown], [24, 24])
    assert dear.asked[0] == 0 < dear.asked[1]
    tree = _Tree()
    tree.graft(Block([1, 2, 3], [-1, -1, 0]), [0.5, 0.3, 0.5], "a")
    assert tree.covered() == pytest.approx([0.8, 0.25])


def test_mixed_is_named_with_its_members_and_their_options() -> None:
    form = "speculative(drafter=mixed(drafters=suffix(depth=12, factor=2)+token-recycling, nodes=8))"
    strategy = decoding.resolve(form)
    assert isinstance(strategy, Speculative)
    mixed = drafting.find(str(strategy.drafter))
    assert isinstance(mixed, Mixed) and [str(m) for m in mixed._members] == [
        "suffix(depth=12, factor=2)",
        "token-recycling",
    ]
    with pytest.raises(UnknownName, match="suffix"):
        drafting.find("mixed(drafters=sufix+token-recycling)")
    with pytest.raises(InvalidRequest, match="nodes"):
        drafting.find("mixed(nodes=0)")
    with pytest.raises(InvalidRequest, match="at least one"):
        Mixed([])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_mixed_answers_are_plain_decodings_and_every_token_has_its_origin(temperature: float) -> None:
    model = tiny_model("llama")
    backend = LocalBackend(model, tiny_tokenizer(), slots=8, capacity=96)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=temperature, seed=3)
    inputs = prompts(6, seed=3)
    plain = run(backend.engine, [(p, decoding.Autoregressive().decoder(backend)) for p in inputs], params)
    for width in (4, Width(Table(1.0, 0.1))):
        decoder = SpeculativeDecoder(Mixed(), width)
        results = [run(backend.engine, [(p, decoder) for p in inputs], params) for _ in range(2)][1]
        assert [s.new_tokens for s in results] == [s.new_tokens for s in plain]
        assert accepted(results) > 0
        names = set()
        for sequence in results:
            found = origins(sequence.trace)
            assert len(found) == len(sequence.new_tokens)
            assert [o.step for o in found] == sorted(o.step for o in found)
            names |= {o.drafter for o in found}
            report = speculation(sequence.trace)
            assert sum(n * times for n, times in report.histogram.items()) == report.passes * report.acceptance_length
            assert report.wasted == sum(s.drafted - s.accepted for s in sequence.trace if not s.prefill)
            assert set(report.by_source) <= {"prompt-lookup", "suffix", "token-recycling"}
            assert all(share.accepted <= share.drafted for share in report.by_source.values())
        assert "" in names and any("suffix" in name for name in names)


@pytest.mark.parametrize("name", ["layer-skip(layers=1)", "quantised(weights=int4)"])
def test_sampling_from_the_target_itself_keeps_its_distribution(name: str) -> None:
    if name.startswith("quantised") and fused.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    assert chi_square(*outcomes(drafting.find(name), SpeculativeDecoder, 1500, attach=True)) > 1e-4
    assert chi_square(*outcomes(drafting.find("layer-skip(layers=1)"), KeepsTheFirstGuess, 800, attach=True)) < 1e-6


@pytest.mark.parametrize("name", ["mixed(nodes=2)", "mixed(drafters=suffix)"])
def test_mixed_sampling_keeps_the_models_distribution(name: str) -> None:
    assert chi_square(*outcomes(drafting.find(name), SpeculativeDecoder, 1500)) > 1e-4
    assert chi_square(*outcomes(drafting.find(name), KeepsTheFirstGuess, 800)) < 1e-6


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


def bytes_reversed() -> PreTrainedTokenizerFast:
    """The byte tokenizer with ids the other way round, and specials as they are."""
    return _byte_tokenizer({character: 255 - byte for byte, character in enumerate(byte_alphabet())}, [])


def pairs_merged() -> PreTrainedTokenizerFast:
    """Bytes in another order, and some pairs of letters as one token."""
    alphabet = byte_alphabet()
    vocabulary = {character: 255 - byte for byte, character in enumerate(alphabet)}
    merges = [("a", "b"), ("c", "d"), ("e", "r")]
    return _byte_tokenizer(vocabulary | {a + b: 259 + i for i, (a, b) in enumerate(merges)}, merges)


def _byte_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    special = {"<bos>": 256, "<eos>": 257, "<turn>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | special, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", additional_special_tokens=["<turn>"]
    )


def renumbered(model: PreTrainedModel) -> PreTrainedModel:
    """The same model for `bytes_reversed`."""
    other = tiny_model(model.config.model_type)
    order = torch.tensor([*range(255, -1, -1), *range(256, VOCABULARY)])
    tables: list[Any] = [other.get_input_embeddings(), other.get_output_embeddings()]
    with torch.no_grad():
        for table in tables:
            table.weight.copy_(table.weight[order].clone())
    return other


def words(count: int) -> list[list[int]]:
    """Prompts of printable text, which every tokenizer decodes alone."""
    random = np.random.default_rng(count)
    return [random.integers(97, 103, size=random.integers(4, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_draft_model_that_differs_in_its_ids_alone_is_always_right(temperature: float) -> None:
    """With all tokens shared, what the intersection leaves is the target itself, sampled or not."""
    model = tiny_model("llama")
    backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=96)
    params = SamplingParams(max_new_tokens=12, temperature=temperature, seed=1, ignore_eos=True)
    for other, right in ((renumbered(model), True), (tiny_model("llama", seed=5), False)):
        drafter = CrossVocabulary(other, tokenizer=bytes_reversed())
        drafter.attach(backend)
        drafter._translation.to_draft = lambda s: [255 - t if t < 256 else t for t in s.tokens]  # type: ignore[method-assign, assignment]
        results = run(backend.engine, [(p, SpeculativeDecoder(drafter, 3)) for p in words(4)], params)
        assert [s.error for s in results] == [None] * 4
        wasted = sum(t.drafted - t.accepted for s in results for t in s.trace)
        assert (wasted == 0) == right


@pytest.mark.parametrize("method", ["intersection", "text"])
def test_cross_vocabulary_answers_are_plain_decodings(method: str) -> None:
    model = tiny_model("llama")
    backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=128)
    draft = tiny_model("llama", vocab_size=262)
    for temperature in (0.0, 0.7):
        params = SamplingParams(max_new_tokens=20, temperature=temperature, seed=2, ignore_eos=True)
        plain = run(backend.engine, [(p, decoding.Autoregressive().decoder(backend)) for p in words(5)], params)
        drafter = CrossVocabulary(draft, method=method, tokenizer=pairs_merged())
        drafter.attach(backend)
        results = run(backend.engine, [(p, SpeculativeDecoder(drafter, 4)) for p in words(5)], params)
        assert [s.error for s in results] == [None] * 5
        assert sum(t.drafted for s in results for t in s.trace) > 0
        if temperature == 0 or method == "text":  # sampled drafts keep the distribution, not the tokens of a seed
            assert [s.new_tokens for s in results] == [s.new_tokens for s in plain]


def test_text_crosses_vocabularies_and_comes_back() -> None:
    target, draft = tiny_tokenizer(), pairs_merged()
    translation = Translation(target, draft, (VOCABULARY, 262))
    sequence = text(list(b"a cab, "), list(b"abcd er"))
    there = translation.to_draft(sequence)
    assert draft.decode(there) == "a cab, abcd er" and len(there) < len(sequence.tokens)
    more = draft("ab said er", add_special_tokens=False)["input_ids"]
    assert translation.to_target(sequence, there, more) == list(b"ab said er")
    assert translation.to_target(sequence, there, [255 - 0xC3]) == [], "half a character says nothing yet"
    long = text([1], list(b"abcd er ") * 40)
    first = translation.to_draft(long)
    long.tokens += list(b"cdcd")
    assert draft.decode(translation.to_draft(long)) == target.decode(long.tokens) != draft.decode(first)
    back = Translation(draft, target, (262, VOCABULARY))
    merged = text(draft("xabcd", add_special_tokens=False)["input_ids"])
    assert back.to_target(merged, list(b"xabcd"), list(b"ab")) == [259], "two bytes are one token there"


def test_vocabularies_with_nothing_in_common_are_refused() -> None:
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=1, capacity=32)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"漢": 0, "字": 1}, merges=[])))
    with pytest.raises(ModelError, match="method=text"):
        CrossVocabulary(tiny_model("llama", vocab_size=300), tokenizer=other).attach(backend)
    wrong: list[tuple[dict[str, Any], str]] = [({"method": "magic"}, "method"), ({}, "tokenizer")]
    for options, named in wrong:
        with pytest.raises(InvalidRequest, match=named):
            CrossVocabulary(tiny_model("llama"), **options)


def letters(alphabet: str) -> PreTrainedTokenizerFast:
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def intersecting() -> CrossVocabulary:
    """Three of the target's four tokens, in another order, and one that it does not have."""
    from tests.test_drafters import _SMALL

    backend = LocalBackend(tiny_model("llama", **_SMALL), letters("abcd"), slots=64, capacity=16)
    draft = tiny_model("llama", seed=3, **{**_SMALL, "num_hidden_layers": 1, "initializer_range": 0.3})
    drafter = CrossVocabulary(draft, tokenizer=letters("dxba"))
    drafter.attach(backend)
    return drafter


class ForgetsToRenormalize(SpeculativeDecoder):
    """The negative control: the draft model's distribution over all of its tokens, the shared ones too rare."""

    def _propose(self, sequences: List[Sequence], lengths: list[int]) -> list[Draft]:
        drafts = super()._propose(sequences, lengths)
        return [
            draft if draft.probabilities is None else Draft(draft.block, draft.probabilities * 0.6) for draft in drafts
        ]


def test_the_intersection_keeps_the_models_distribution() -> None:
    assert chi_square(*outcomes(intersecting(), SpeculativeDecoder, 2500)) > 1e-4
    assert chi_square(*outcomes(intersecting(), ForgetsToRenormalize, 2500)) < 1e-6


def test_a_backend_answers_with_every_untrained_drafter_by_name() -> None:
    lm: Any = LocalBackend(tiny_model("llama"), tiny_tokenizer(), eos=[EOS], slots=2, capacity=256)
    params = decoding.SamplingParams(max_new_tokens=12, ignore_eos=True)
    plain = decoding.generate("abcabc", lm, params=params).tokens
    for drafter in ("mixed", "layer-skip(layers=1)", "suffix", "token-recycling", "prompt-lookup"):
        strategy = f"speculative(drafter={drafter})"
        assert decoding.generate("abcabc", lm, strategy=strategy, params=params).tokens == plain
