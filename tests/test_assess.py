"""What is said about answers without a judge: meaning by a sentence encoder, perplexity under a model, averages."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from decoding.assess import Assessment, averages, perplexity
from decoding.backends.local import LocalBackend
from decoding.errors import ModelError
from decoding.similarity import SentenceEncoder
from tests.tiny import EOS, VOCABULARY, tiny_model, tiny_tokenizer

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["river", "stone", "tree", "light", "water", "leaf", "town", "bread", "wind", "glass"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    """A random encoder with a window of 14 words."""
    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*MARKS, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {f"{mark[1:-1].lower()}_token": mark for mark in MARKS}
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(MARKS) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return SentenceEncoder(folder)


def test_texts_become_unit_vectors(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(["river stone", "river stone", "bread wind glass", ""])
    assert vectors.shape == (4, 16)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1, 0], abs=1e-5)
    assert (vectors[0] == vectors[1]).all() and vectors[0] @ vectors[2] < 0.99
    assert encoder.similarity("tree light", "tree light") == pytest.approx(1.0, abs=1e-5)


def test_a_long_text_is_read_to_its_end(encoder: SentenceEncoder) -> None:
    begun = "river stone tree light water leaf town " * 4  # two windows
    assert encoder.similarity(begun + "bread " * 14, begun + "glass " * 14) < 0.999


def test_what_is_no_encoder_is_refused_and_a_missing_one_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install"):
        SentenceEncoder()
    with pytest.raises(ModelError, match="cannot be loaded"):
        SentenceEncoder(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds no sentence encoder"):
        SentenceEncoder(tmp_path)


def backend(model: torch.nn.Module) -> LocalBackend:
    return LocalBackend(model, tiny_tokenizer(), eos=[EOS], slots=2, capacity=128)  # type: ignore[arg-type]


def test_the_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert perplexity(backend(model), "What is it?", "An answer.") == pytest.approx(VOCABULARY, rel=1e-5)


def test_perplexity_is_the_answers_alone_and_behind_its_question() -> None:
    model = tiny_model()
    lm = backend(model)
    question, answer = "Why?", "Since."
    tokens = lm.encode(question, answer)
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)
    own = [-float(logs[i - 1, tokens[i]]) for i in range(len(tokens) - len(answer), len(tokens))]
    expected = math.exp(sum(own) / len(own))
    found = perplexity(lm, question, answer)
    assert found == pytest.approx(expected, rel=1e-4)
    assert perplexity(lm, "Another question?", answer) != pytest.approx(expected, rel=1e-3)
    assert perplexity(lm, question, "") is None
    assert perplexity(lm, "x" * 600, answer) is None  # the question fills the context
    assert perplexity(lm, "x" * 400, "y" * 600) is not None


def test_averages_leave_out_what_is_missing() -> None:
    answers = [
        Assessment(1, "skeleton", 0.2, 0.5, similarity=0.9, perplexity=2.0),
        Assessment(2, "skeleton", 0.4, 0.7, similarity=None, perplexity=8.0),
        Assessment(1, "autoregressive", 0.0, 1.0),
    ]
    assert averages(answers, "skeleton") == pytest.approx(
        {"similarity": 0.9, "redundancy": 0.3, "coverage": 0.6, "perplexity": 4.0}
    )
    assert set(averages(answers, "autoregressive")) == {"redundancy", "coverage"}
