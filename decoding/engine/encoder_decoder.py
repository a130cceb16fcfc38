"""An encoder and a decoder behind the runner's interface, for masked refinement.

Conditional masked language models (CMLM, Ghazvininejad et al. 2019): the encoder reads what a sequence has committed,
its prompt; the decoder sees its start token and the whole block, in both directions, and what the encoder said. That is
kept while the prompt stays the same, so that further passes cost the decoder alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from decoding.engine.block import Block
from decoding.engine.cache import KVCache
from decoding.engine.packing import Row
from decoding.engine.precision import round_weights
from decoding.engine.runner import Runner, _context_length, _vocabulary, embeddings
from decoding.errors import ModelError

logger = logging.getLogger(__name__)


class EncoderDecoderRunner(Runner):
    """Runs encoder-decoder models whose decoder takes an attention mask of [batch, 1, tokens, tokens] (BART, Marian,
    T5 and the like). Parameters are those of `Runner`; a sequence's capacity is shared by its prompt and its answer.

    Only rows in which everything sees everything can be run, with blocks that hold the whole answer. Refuses, with a
    `ModelError`, models without a start token and those whose decoder looks back only, whatever the mask says.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int = 32,
        capacity: int | None = None,
        weights: str = "float32",
        compile: bool = False,
    ) -> None:
        self.model = model.eval()
        self.config = model.config
        self.vocab = _vocabulary(model)
        self.device: torch.device = embeddings(model).device
        self.context = _context_length(self.config)
        self.capture = ()
        self.captured = torch.empty(0)
        self.features = None
        self.fused = None
        if weights != "float32":
            round_weights(model, weights)
        start = getattr(self.config, "decoder_start_token_id", None)
        if not isinstance(start, int):
            raise ModelError(
                f"this {self.config.model_type} model names no token that its decoder starts with; set "
                "decoder_start_token_id in its config.json."
            )
        self._start = start
        # Keys and values are not kept: every pass may change all of them. Slots say who is who.
        self.cache = KVCache([], slots, min(capacity or 2048, self.context))
        self._sources: dict[int, tuple[tuple[int, ...], torch.Tensor]] = {}  # by slot: tokens, encoder's output
        self._check()
        if compile:
            logger.warning("the layers run uncompiled: those of encoder-decoder models cannot be compiled.")

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], *, layers: int | None = None, weights: str | None = None) -> torch.Tensor:
        """Logits [positions, vocab]: for every row, at the decoder's start token and then at each place of its block.

        Raises ModelError for rows with attention of another kind.
        """
        if layers is not None or any(row.span for row in rows):
            raise ModelError(
                f"this {self.config.model_type} model has an encoder, so it fills answers in and does not continue "
                "them; use mask-predict."
            )
        self._read([row for row in rows if self._sources.get(row.slot, ((),))[0] != tuple(row.pending)])
        sources = [self._sources[row.slot][1] for row in rows]
        lengths = torch.tensor([1 + len(row.block) for row in rows], device=self.device)
        place = torch.arange(int(lengths.max()), device=self.device)
        there = place < lengths[:, None]  # [rows, width]
        tokens = torch.full(there.shape, self._start, device=self.device)
        for i, row in enumerate(rows):
            tokens[i, 1 : 1 + len(row.block)] = torch.tensor(list(row.block.tokens), device=self.device)
        # Padding sees what the others see, so that no query is left without anything.
        visible = there[:, None, None, :].expand(-1, 1, len(place), -1)
        bias = torch.zeros(visible.shape, dtype=self.model.dtype, device=self.device)
        logits: torch.Tensor = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=pad_sequence(sources, batch_first=True)),
            attention_mask=self._mask([len(source) for source in sources]),
            decoder_input_ids=tokens,
            decoder_attention_mask=bias.masked_fill(~visible, torch.finfo(bias.dtype).min),
            use_cache=False,
        ).logits
        return logits[there]

    def _read(self, rows: Sequence[Row]) -> None:
        """Run the encoder over prompts that it has not read."""
        if not rows:
            return
        prompts = [torch.tensor(list(row.pending), device=self.device) for row in rows]
        hidden = self.model.get_encoder()(
            input_ids=pad_sequence(prompts, batch_first=True), attention_mask=self._mask([len(p) for p in prompts])
        ).last_hidden_state
        for row, said in zip(rows, hidden, strict=True):
            self._sources[row.slot] = tuple(row.pending), said[: len(row.pending)]

    def _mask(self, lengths: Sequence[int]) -> torch.Tensor:
        """[rows, longest] 1 where there is a token, 0 behind it."""
        place = torch.arange(max(lengths), device=self.device)
        return (place < torch.tensor(lengths, device=self.device)[:, None]).long()

    @torch.inference_mode()
    def _check(self) -> None:
        """The first place must depend on the last one, and on nothing of another row."""
        a, b, c, d = self._sample_tokens(4).tolist()
        last = self.cache.slots - 1
        mine, other = Row(0, [a, b], Block([c, d], bidirectional=True), span=0), [a, b, c, d]
        alone = self.forward([mine])
        changed = self.forward([Row(0, [a, b], Block([c, a], bidirectional=True), span=0)])
        beside = self.forward([mine, Row(last, other, Block(other, bidirectional=True), span=0)][: self.cache.slots])
        self._sources.clear()
        size = alone.abs().max().clamp(min=1e-6)
        loose = 1e-3 if self.model.dtype == torch.float32 else 0.1
        apart, moved = (alone - beside[: len(alone)]).abs().max(), (alone - changed)[:2].abs().max()
        if not apart <= loose * size or moved <= 1e-5 * size:
            raise ModelError(
                f"the decoder of this {self.config.model_type} model does not take a mask that lets all places of an "
                "answer see each other, so it cannot fill one in."
            )
