"""A draft model with another tokenizer: its guesses are carried over through the text.

Two ways, after Timor et al. 2025, "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for
Heterogeneous Vocabularies". *intersection*: the draft model chooses among the tokens that both vocabularies have, its
distribution renormalized over them, so that sampled drafts keep the target's distribution. *text*: it writes what it
likes, and the target's tokenizer reads that; such guesses count as not sampled.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.errors import InvalidRequest, ModelError
from drafters.draft_model import Follower, guess_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from decoding.backends.local import LocalBackend
    from decoding.engine.sequence import Sequence

_METHODS = ("intersection", "text")
_TAIL = 32  # tokens at a text's end that are encoded again when it grows: new text can change how old text is cut


@dataclass(eq=False)
class CrossVocabulary(Drafter):
    """model: an alias, folder, .gguf file or hub id, or a transformers model. method: "intersection" or "text".
    tokenizer: the draft model's, where `model` is an object."""

    model: str | PreTrainedModel
    method: str = "intersection"
    tokenizer: PreTrainedTokenizerBase | None = None

    name: ClassVar[str] = "cross-vocabulary"
    summary: ClassVar[str] = "a draft model of another tokenizer; cross-vocabulary(model=NAME, method=text)"

    _backend: LocalBackend = field(init=False, repr=False)
    _follower: Follower = field(init=False, repr=False)
    _translation: Translation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise InvalidRequest(
                f"cross-vocabulary needs method to be one of {', '.join(_METHODS)}, not {self.method!r}."
            )
        if isinstance(self.tokenizer, str) or (not isinstance(self.model, str) and self.tokenizer is None):
            raise InvalidRequest("cross-vocabulary needs the tokenizer of a model that is given as an object.")

    def attach(self, backend: LocalBackend) -> None:
        """Raises ModelError if the two vocabularies have nothing in common and the method needs that."""
        self._backend = backend
        model, tokenizer = self.model, self.tokenizer
        if isinstance(model, str):
            from decoding.models import load_model

            loaded = load_model(model, device=str(backend.device))
            model, tokenizer = loaded.model, loaded.tokenizer
        assert tokenizer is not None
        self._follower = Follower.beside(backend, model)
        vocabularies = (backend.engine.runner.vocab, self._follower.runner.vocab)
        self._translation = Translation(backend.tokenizer, tokenizer, vocabularies)
        if self.method == "intersection" and not len(self._translation.target_ids):
            raise ModelError(
                f"the draft model's vocabulary and that of {backend.name} have no token in common; use method=text."
            )

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        texts = [self._translation.to_draft(s) if n > 0 else [] for s, n in zip(sequences, lengths, strict=True)]
        capacity = self._follower.runner.cache.capacity
        lengths = [max(0, min(n, capacity + 1 - len(t))) for t, n in zip(texts, lengths, strict=True)]
        if self.method == "text":
            return self._write(sequences, texts, lengths)
        words = self._translation

        def ahead(active: list[int], guesses: list[list[int]]) -> torch.Tensor:
            logits = self._follower.logits(
                {
                    sequences[i].id: texts[i] + [words.draft_of[token] for token in guess]
                    for i, guess in zip(active, guesses, strict=True)
                }
            )
            shared = logits.new_full((len(active), self._backend.engine.runner.vocab), -torch.inf)
            shared[:, words.target_ids] = logits[:, words.draft_ids]
            return shared

        return guess_ahead(sequences, lengths, ahead)

    def _write(self, sequences: List[Sequence], texts: List[list[int]], lengths: List[int]) -> list[Draft]:
        written: list[list[int]] = [[] for _ in sequences]
        for level in range(max(lengths, default=0)):
            active = [i for i, length in enumerate(lengths) if length > level]
            logits = self._follower.logits({sequences[i].id: texts[i] + written[i] for i in active})
            for i, token in zip(active, logits.argmax(dim=-1).tolist(), strict=True):
                written[i].append(token)
        return [
            Draft(Block(self._translation.to_target(sequence, text, more)[:length])) if more else Draft()
            for sequence, text, more, length in zip(sequences, texts, written, lengths, strict=True)
        ]

    def cost(self, levels: int, sequences: int, context: float) -> float:
        return self._follower.cost(levels, sequences, context)

    def forget(self, sequence: Sequence) -> None:
        self._follower.forget(sequence.id)
        self._translation.forget(sequence)


class Translation:
    """Texts and tokens of a target's tokenizer in a draft model's, and back.

    target_ids, draft_ids: [shared] the tokens that both have. draft_of: target id → draft id of these.
    """

    def __init__(
        self, target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, vocabularies: tuple[int, int]
    ) -> None:
        self._target, self._draft = target, draft
        ours, theirs = _spellings(target, vocabularies[0]), _spellings(draft, vocabularies[1])
        pairs = sorted((ours[word], theirs[word]) for word in ours.keys() & theirs.keys())
        ends = (target.eos_token_id, draft.eos_token_id)
        if None not in ends and ends[0] < vocabularies[0] and ends[1] < vocabularies[1]:
            pairs.append(ends)
        self.draft_of = dict(pairs)
        self.target_ids = torch.tensor([ours for ours, _ in pairs], dtype=torch.long)
        self.draft_ids = torch.tensor([theirs for _, theirs in pairs], dtype=torch.long)
        # Per sequence: so many of the target's tokens, and what they are in the draft model's, for good.
        self._known: dict[int, tuple[int, list[int]]] = {}

    def to_draft(self, sequence: Sequence) -> list[int]:
        """The sequence's text in the draft model's tokens."""
        tokens = sequence.tokens
        count, known = self._known.get(sequence.id, (0, []))
        if len(tokens) - count > 2 * _TAIL:
            known = known + _encode(self._draft, _decode(self._target, tokens[count:-_TAIL]))
            count = len(tokens) - _TAIL
            self._known[sequence.id] = count, known
        text = known + _encode(self._draft, _decode(self._target, tokens[count:]))
        return text or [self._draft.eos_token_id or 0]

    def to_target(self, sequence: Sequence, before: list[int], written: list[int]) -> list[int]:
        """What the draft model wrote behind `before`, in the target's tokens."""
        tail = before[-_TAIL:]
        start = _decode(self._draft, tail)
        text = _decode(self._draft, tail + written)[len(start) :].rstrip("\ufffd")  # half a character at the end
        if not text:
            return []
        # Encoded together with what is there, new text is cut as the target would cut it.
        for back in (_TAIL, _TAIL // 4, 1):
            end = sequence.tokens[-back:]
            both = _encode(self._target, _decode(self._target, end) + text)
            if both[: len(end)] == end:
                return both[len(end) :]
        return _encode(self._target, text)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._known.pop(sequence.id, None)


def _spellings(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, int]:
    """Every ordinary token as written in the vocabulary, a space spelled alike everywhere."""
    special = set(tokenizer.all_special_ids)
    return {
        word.replace("▁", "Ġ"): token
        for word, token in tokenizer.get_vocab().items()
        if token not in special and token < vocabulary
    }


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: List[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
