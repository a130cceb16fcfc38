"""Draft models of another vocabulary."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import decoding
from decoding.backends.local import LocalBackend
from decoding.drafting import Draft
from decoding.engine.sequence import Sequence
from decoding.errors import InvalidRequest, ModelError
from decoding.strategies.speculative import SpeculativeDecoder
from decoding.types import SamplingParams
from drafters import CrossVocabulary
from drafters.cross_vocabulary import Translation
from tests.greedy import run
from tests.test_drafters import chi_square, outcomes, text
from tests.tiny import VOCABULARY, byte_alphabet, tiny_model, tiny_tokenizer


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
