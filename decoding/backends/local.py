"""A model on this machine: tokenizer, engine, and the loop that drives it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from collections.abc import Sequence as List
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.backends.base import Backend, OnText, messages_of
from decoding.backends.choice import Choice, NextToken
from decoding.backends.text import TextStream, token_pieces
from decoding.backends.turns import Turns
from decoding.engine.decoder import Decoder
from decoding.engine.engine import Engine
from decoding.engine.latency import LatencyModel, latency_of
from decoding.engine.pace import Live
from decoding.engine.runner import Runner
from decoding.engine.sequence import Sequence
from decoding.errors import CapabilityError, InvalidRequest
from decoding.masked import Masking
from decoding.trace import measure
from decoding.types import Generation, Prompt, SamplingParams

if TYPE_CHECKING:
    from decoding.strategies.base import TokenStrategy


_WORTH_HAVING = 0.95
"""Of the highest tokens per second: sequences beyond those that reach this add nothing but waiting for the others."""


class LocalBackend(Backend):
    """A Hugging Face model behind the engine. `decoding.load` makes one.

    model, tokenizer: the Hugging Face objects; using them directly does not disturb the engine.
    masking: how a masked checkpoint fills in; None for causal ones. engine: the token-level engine.
    eos: ids that end an answer. slots, capacity, weights, compile, step_tokens: see `Runner` and `Engine`.
    variants: backends of the same model with other weights, by name, for strategies that need them; variant: the name
    that this one has among those of another, or ""; files: when those that it was made from were written, and their
    sizes.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"text", "prefill", "tokens"})

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        eos: Iterable[int] = (),
        slots: int = 32,
        capacity: int | None = None,
        step_tokens: int | None = None,
        masking: Masking | None = None,
        weights: str = "float32",
        compile: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or model.config.model_type
        kind = Runner
        if masking is not None and masking.encoder:
            from decoding.engine.encoder_decoder import EncoderDecoderRunner

            kind = EncoderDecoderRunner
        self.engine = Engine(kind(model, slots, capacity, weights, compile), step_tokens)
        self.eos = frozenset(eos)
        self.masking = masking
        if masking is not None:  # it fills masks in: what continues a text token by token has no use for it
            self.capabilities = frozenset({"text", "prefill", "masked"})  # type: ignore[misc]
        self.parameters = model.num_parameters()
        self.variant = ""
        self.files: tuple[tuple[int, int], ...] = ()
        self.variants: dict[str, LocalBackend] = {}
        self._decoders: dict[TokenStrategy, Decoder] = {}
        self._answers: dict[Sequence, asyncio.Future[None]] = {}
        self._pump: asyncio.Task[None] | None = None
        self._turns = Turns()

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.engine.runner.device

    @cached_property
    def latency(self) -> LatencyModel:
        """What a step costs here; measured at the first time of asking, if it never was on this machine."""
        return latency_of(self.engine.runner)

    @cached_property
    def live(self) -> Live:
        """`latency`, corrected by what the engine's steps take as they run."""
        live = Live(self.latency, self.engine.beside)
        self.engine.on_step = live.saw
        return live

    def encode(self, prompt: Prompt, prefill: str = "") -> list[int]:
        """Token ids of a prompt: text and messages go through the chat template, ids stay as they are.

        A model without a chat template gets the bare text, messages joined by blank lines.
        """
        if isinstance(prompt, List) and prompt and all(isinstance(item, int) for item in prompt):
            more = self.tokenizer(prefill, add_special_tokens=False)["input_ids"] if prefill else []
            return [item for item in prompt if isinstance(item, int)] + list(more)
        messages = messages_of(prompt)
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages) + prefill
            return list(self.tokenizer(text)["input_ids"])
        try:
            plain = [{"role": message["role"], "content": message["content"]} for message in messages]
            text = str(self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            raise InvalidRequest(f"the model's chat template does not take these messages: {error}") from error
        return list(self.tokenizer(text + prefill, add_special_tokens=False)["input_ids"])

    def decoder(self, strategy: TokenStrategy) -> Decoder:
        """The strategy's decoder on this backend; equal strategies share one, so their sequences plan together."""
        if self.masking is not None and "masked" not in strategy.needs:  # plain decoding asks for text alone
            raise CapabilityError(
                f"{strategy} continues a text, and {self.name} fills masks in; use block-diffusion or mask-predict."
            )
        if strategy not in self._decoders:
            self._decoders[strategy] = strategy.decoder(self)
        return self._decoders[strategy]

    def forget(self) -> None:
        self.engine.cache.forget()
        for decoder in self._decoders.values():
            decoder.unlearn()
        for variant in self.variants.values():
            variant.forget()

    def pieces(self, tokens: List[int]) -> list[str]:
        return token_pieces(self.tokenizer, tokens)

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams,
        strategy: TokenStrategy,
        *,
        prefill: str = "",
        on_text: OnText | None = None,
    ) -> Generation:
        if (home := strategy.home(self)) is not self:
            return await home.complete(prompt, params, strategy, prefill=prefill, on_text=on_text)
        stream = TextStream(self.tokenizer, params.stop)

        def on_commit(_: Sequence, tokens: List[int]) -> int | None:
            stopped_after = stream.feed(tokens)
            if on_text is not None and (piece := stream.release()) and on_text(piece) is True:
                return len(tokens) if stopped_after is None else stopped_after
            return stopped_after

        watched = on_text is not None or bool(params.stop)
        async with self._turns:
            sequence = self.engine.submit(
                self.encode(prompt, prefill),
                params,
                self.decoder(strategy),
                self.eos,
                on_commit if watched else None,
            )
            await self._finished(sequence)
        if not watched:
            stream.feed(sequence.new_tokens)
        rest = stream.finish()
        if on_text is not None and rest:
            on_text(rest)
        return self._generation(sequence, stream.text)

    async def choose(self, prompt: Prompt, options: List[str]) -> Choice:
        """By the likelihoods of the options' first tokens at the end of the prompt; nothing is generated.

        Raises InvalidRequest if two options begin with the same token, and CapabilityError for a masked model, which
        has no next token.
        """
        if self.masking is not None:
            raise CapabilityError(
                f"choosing an option takes the likelihoods of a next token, and {self.name} fills masks in; "
                "use router=always or a function as router with it, or a causal model."
            )
        ids = self.encode(prompt)
        firsts = [self.encode(prompt, option)[len(ids) : len(ids) + 1] for option in options]
        tokens = [token for first in firsts for token in first]
        if len(tokens) != len(options) or len(set(tokens)) != len(tokens):
            raise InvalidRequest(f"the options {', '.join(options)} must begin with different tokens; use other words.")
        decoder = NextToken(tokens)
        async with self._turns:
            sequence = self.engine.submit(ids, SamplingParams(max_new_tokens=1), decoder, (), lambda *_: 0)
            await self._finished(sequence)
        generation = self._generation(sequence, "")
        if not decoder.logprobs:
            return Choice(None, generation)
        chances = dict(zip(options, torch.tensor(decoder.logprobs).softmax(dim=0).tolist(), strict=True))
        return Choice(max(chances, key=lambda option: chances[option]), generation, chances)

    def at_once(self, prompt: Prompt, strategy: TokenStrategy, most: int) -> int:
        home = strategy.home(self)
        if self.masking is not None:
            return most  # masks are filled in many at a time
        if "latency" not in vars(home):
            with home._turns.now() as mine:
                if not mine or not home.engine.cache.free:
                    return most  # it takes the engine, and a free slot, to measure
                home.latency  # noqa: B018
        counts = np.arange(1, most + 1)
        rate = counts / home.latency.cost(counts, counts, len(self.encode(prompt)))
        return int(np.argmax(rate >= _WORTH_HAVING * rate.max())) + 1

    def _generation(self, sequence: Sequence, text: str) -> Generation:
        assert sequence.finish_reason is not None
        return Generation(
            text=text,
            tokens=sequence.new_tokens,
            finish_reason=sequence.finish_reason,
            metrics=measure(
                sequence.trace,
                seconds=sequence.trace[-1].end if sequence.trace else 0.0,
                prompt_tokens=len(sequence.prompt),
            ),
            trace=sequence.trace,
            logprobs=sequence.logprobs if sequence.params.logprobs else None,
            error=None if sequence.error is None else f"{type(sequence.error).__name__}: {sequence.error}",
        )

    async def _finished(self, sequence: Sequence) -> None:
        """Wait for the end of a sequence; if the wait ends before, so does the sequence."""
        loop = asyncio.get_running_loop()
        self._answers[sequence] = loop.create_future()
        if self._pump is None or self._pump.done() or self._pump.get_loop() is not loop:
            self._pump = loop.create_task(self._run())
        try:
            await self._answers[sequence]
        except BaseException:
            self.engine.cancel(sequence)
            raise
        finally:
            del self._answers[sequence]

    async def _run(self) -> None:
        """Step the engine while anybody waits. Strategies act between steps, in a fixed order."""
        loop = asyncio.get_running_loop()
        while any(not answer.done() and answer.get_loop() is loop for answer in self._answers.values()):
            try:
                ended = self.engine.step()
            except BaseException as error:
                for answer in self._answers.values():
                    if not answer.done():
                        answer.set_exception(error)
                raise
            for sequence in ended:
                if sequence in self._answers and not self._answers[sequence].done():
                    self._answers[sequence].set_result(None)
            # Give strategies that were waiting for these time to submit what comes next.
            for _ in range(4 if ended else 1):
                await asyncio.sleep(0)
