"""A model, its cache, and one forward pass over the blocks of many sequences."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from decoding.engine.attention import ShapeProbe, attending
from decoding.engine.block import Block
from decoding.engine.cache import KVCache
from decoding.engine.compiled import CompiledLayers
from decoding.engine.fused import FusedModel, fuse
from decoding.engine.kernels import FastLinears
from decoding.engine.packing import Row, flatten, pack
from decoding.engine.precision import WEIGHTS, round_weights
from decoding.errors import ModelError

logger = logging.getLogger(__name__)


class Runner:
    """Runs any Hugging Face decoder model that honours the attention interface.

    model: the transformers model, left as it is; slots: sequences held at once; capacity: tokens per
    sequence, by default the model's context up to 2,048. weights: "float32", or "int8" or "int4" to round those of
    linear layers to 8 or 4 bits (the model's own too, which so stays what a step can be compared with). compile: run
    the model's layers compiled, see `decoding.engine.compiled`; if that is not possible, a warning says why.

    On construction the model is tried on a few tokens, packed and unpacked. One that keeps state
    outside its attention layers (and so cannot roll back), or gives other logits when packed, is
    refused with a `ModelError`.
    """

    compiled: CompiledLayers | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int = 32,
        capacity: int | None = None,
        weights: str = "float32",
        compile: bool = False,
    ) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config()
        self.vocab = _vocabulary(model)
        self.device: torch.device = embeddings(model).device
        self.context = _context_length(self.config)
        self._configs = _attention_configs(model)
        self._arguments = set(inspect.signature(model.forward).parameters)
        self._stack = _decoder_layers(model, int(self.config.num_hidden_layers))
        self.capture: tuple[int, ...] = ()
        self.captured = torch.empty(0)
        self.features: torch.Tensor | None = None
        layers = self._probe()
        capacity = min(capacity or 2048, self.context)
        per_slot = capacity * sum(layer.bytes_per_token for layer in layers)
        affordable = int(_free_memory(self.device) * 0.6 // per_slot)
        if affordable < 1:
            raise ModelError(
                f"one sequence of {capacity} tokens needs {per_slot / 2**30:.1f} GiB of cache, more than is free; "
                "load the model with a smaller capacity."
            )
        if affordable < slots:
            logger.warning("memory allows %d slots of %d tokens instead of %d.", affordable, capacity, slots)
        self.cache = KVCache(layers, min(slots, affordable), capacity)
        if weights != "float32":
            round_weights(model, weights)
        self.fused = fuse(model, self.cache, weights)
        self._held: dict[str, FusedModel] = {}
        if self.fused is None and weights != "float32":
            logger.warning(
                "weights are rounded to %s, but read no faster: there is no compiled step for this model.", weights
            )
        self._linears = FastLinears(model) if self.fused is None else None
        self._check()
        if compile:
            self._compile()

    @property
    def kernels(self) -> str:
        """What computes the steps."""
        if self.fused is not None:
            return f"fused {self.fused.weights}"
        return "layers" if self.compiled is None else "compiled layers"

    @property
    def compile_seconds(self) -> float:
        """How long compiling layers took, 0 if none are."""
        return 0.0 if self.compiled is None else self.compiled.seconds

    def _compile(self) -> None:
        """Have the layers compiled; or say in one warning why they are not, and go on without."""
        if self.fused is not None:
            logger.warning("there is nothing left to compile: steps of this model run in one compiled call already.")
            return
        try:
            self.compiled = CompiledLayers(list(self._stack.layers))
            self.compiled.warm_up(
                lambda tokens: self.forward([Row(0, self._sample_tokens(tokens).tolist(), Block())]),
                self.cache.capacity,
                _rounding(self.model.dtype),
            )
        except Exception as error:  # of many kinds: compilers, drivers, models that were never written for it
            self.compiled = None
            cause = " ".join(str(error).split()) or type(error).__name__
            logger.warning("the layers run uncompiled, since they could not be compiled: %.300s", cause)

    def hold(self, weights: str) -> None:
        """Have the model's weights in fewer bits as well, for `forward(weights=…)` on the same cache.

        Raises ModelError without a compiled step, and where that has so few bits already.
        """
        if self.fused is None:
            raise ModelError(
                f"steps with {weights} weights need the compiled step, which this device or model does not have."
            )
        if WEIGHTS.index(self.fused.weights) >= WEIGHTS.index(weights):
            raise ModelError(f"the model runs on {self.fused.weights} weights already; {weights} would be no faster.")
        held = self._held.get(weights) or fuse(self.model, self.cache, weights)
        assert held is not None
        self._held[weights] = held

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], *, layers: int | None = None, weights: str | None = None) -> torch.Tensor:
        """Run one step. Returns logits [positions, vocab]: for every row that asked for them, at its last
        pending token and then at each guess, row after row.

        Writes keys and values behind each slot's committed ones, as scratch: nothing is counted until
        `cache.commit`, so a step that failed or was thrown away can be run again.

        layers: run only so many of the first decoder layers, then the final norm and the head. What that
        writes to the cache of these layers is what a whole pass would write. weights: run with these, see `hold`.

        While `capture` names layers (0 for the first), a whole pass leaves in `captured` [tokens, len(capture),
        hidden] what these put out, for all tokens of all rows in the order of `rows`.
        """
        whole = layers is None and weights is None
        fused = self.fused if weights is None else self._held[weights]
        if fused is not None:
            tokens, places, keep = flatten(rows, self.cache)
            depth = len(self._stack.layers) if layers is None else layers
            logits, captured = fused.forward(tokens, places, keep, depth, self.capture if whole else ())
            written = places.entries(self.cache.capacity) if self.capture else None
        else:
            assert self._linears is not None
            step = pack(rows, self.cache, self.device)
            count = step.tokens.shape[1]
            with (
                attending(self._configs, step.attention),
                self._linears.active(count),
                nullcontext() if self.compiled is None else self.compiled.active(),
                self._first(layers),
                self._capturing() as outputs,
            ):
                logits = self._call(step.tokens, step.positions, step.keep)
            if whole and self.capture:
                captured = torch.stack([outputs[i] for i in self.capture], dim=1)[step.order]
                written = step.attention.write[step.order]
        if whole and self.capture:
            self.captured = captured
            if self.features is not None:
                self.features.view(-1, *self.features.shape[2:])[written] = captured
        return logits

    def favoured(self, rows: Sequence[Row], levels: int, weights: str) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens of rows of pending tokens if the most likely one is taken `levels` times: these [levels,
        rows], and by how much their logits exceed the next best [levels, rows]. All of it in one call, with weights
        that `hold` has made ready. What is written to the cache is scratch, see `forward`."""
        tokens, places, keep = flatten(rows, self.cache)
        return self._held[weights].favoured(tokens, places, keep, levels)

    def keep_features(self, layers: Sequence[int]) -> None:
        """From now on capture these layers too, and keep what they put out for every token of the cache.

        `features` [slots, capacity, len(capture), hidden] holds it at the place of each token's keys and values, and
        follows them through rollback, fork and compaction. Sequences that run already have zeros for their past.
        """
        wanted = tuple(sorted({*self.capture, *layers}))
        if self.features is None or wanted != self.capture:
            width = int(self.config.hidden_size)
            kept = self.cache.keep(len(wanted) * width, self.model.dtype, self.device)
            self.capture, self.features = wanted, kept.unflatten(-1, (len(wanted), width))

    @contextmanager
    def _first(self, layers: int | None) -> Iterator[None]:
        """Leave out all but the first decoder layers."""
        if layers is None:
            yield
            return
        stack = self._stack
        setattr(stack.parent, stack.name, stack.layers[:layers])
        try:
            yield
        finally:
            setattr(stack.parent, stack.name, stack.layers)

    @contextmanager
    def _capturing(self) -> Iterator[dict[int, torch.Tensor]]:
        """Collect the hidden states, [tokens, hidden], behind the layers that `capture` names."""
        outputs: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                outputs[layer] = hidden[0]

            return hook

        hooks = [self._stack.layers[layer].register_forward_hook(keep(layer)) for layer in self.capture]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def _call(self, tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        extra: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in self._arguments else {}
        logits: torch.Tensor = self.model(input_ids=tokens, position_ids=positions, use_cache=False, **extra).logits[0]
        return logits if extra else logits[keep]

    @torch.inference_mode()
    def _probe(self) -> list[Any]:
        """What each attention layer caches, learnt by watching a forward pass."""
        kind = self.config.model_type
        if self.model.config.is_encoder_decoder:
            raise ModelError(f"{kind} is an encoder-decoder model; the engine runs decoder-only models.")
        probe = ShapeProbe()
        tokens = self._sample_tokens(4)
        with attending(self._configs, probe):
            try:
                positions = torch.arange(4, device=self.device)[None]
                self._call(tokens[None], positions, torch.arange(4, device=self.device))
            except TypeError as error:
                raise ModelError(f"{kind} models take no packed positions, so the engine cannot run them.") from error
            except AttributeError as error:
                raise ModelError(
                    f"{kind} models lack something that the engine needs ({error}), so it cannot run them."
                ) from error
        layers = int(self.config.num_hidden_layers)
        if set(probe.layers) != set(range(layers)):
            raise ModelError(
                f"{len(probe.layers)} of the {layers} layers of this {kind} model use transformers' attention "
                "interface; layers that keep state elsewhere (recurrent or convolutional ones) cannot roll "
                "back, so the engine cannot run it. Use a pure attention model."
            )
        return [probe.layers[i] for i in range(layers)]

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare two ragged sequences, run packed and in pieces, with the model's own plain forward."""
        tokens = self._sample_tokens(9).tolist()
        prompts = [tokens[:9], tokens[2:7]]
        slots = [0, self.cache.slots - 1] if self.cache.slots > 1 else [0]
        prompts = prompts[: len(slots)]
        try:
            pieces = []
            # An encoder's own attention looks both ways, so all of a sequence has to be there at once.
            encoder = type(self.model).__name__.endswith("ForMaskedLM")
            for begin, end in ((0, 9),) if encoder else ((0, 4), (4, 9)):
                rows = [
                    Row(s, p[begin : begin + 1], Block(p[begin + 1 : end]), span=0 if encoder else 1)
                    for s, p in zip(slots, prompts, strict=True)
                ]
                logits = self.forward(rows)
                pieces.append(logits.split([len(row) for row in rows]))
                for row in rows:
                    self.cache.commit(row.slot, [*row.pending, *row.block.tokens])
            for i, prompt in enumerate(prompts):
                ours = torch.cat([piece[i] for piece in pieces]).float()
                plain = (
                    self.model(input_ids=torch.tensor([prompt], device=self.device), use_cache=False).logits[0].float()
                )
                loose = _rounding(self.model.dtype)
                if self.fused is not None and self.fused.weights != "float32":
                    loose = 0.03  # inputs are rounded as well
                gap = (ours - plain).abs().max() / plain.abs().max().clamp(min=1e-6)
                if not gap <= loose:
                    raise ModelError(
                        f"this {self.config.model_type} model gives other logits when run in blocks (relative "
                        f"difference {gap:.2g}), so it does not honour positions or masks the way the engine "
                        "needs; it cannot be run."
                    )
        finally:
            self.cache.lengths[:] = 0

    def _sample_tokens(self, count: int) -> torch.Tensor:
        """A few arbitrary but fixed token ids."""
        rows = embeddings(self.model).shape[0]
        return (torch.arange(count, device=self.device) * 7919 + 11) % rows


@dataclass(frozen=True)
class _Stack:
    """The list of decoder layers, the module that holds it, and its name there."""

    parent: nn.Module
    name: str
    layers: nn.ModuleList


def _decoder_layers(model: PreTrainedModel, count: int) -> _Stack:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return _Stack(parent, name, child)
    raise ModelError(f"this {model.config.model_type} model keeps its {count} layers in no list, so it cannot be run.")


def embeddings(model: PreTrainedModel) -> torch.Tensor:
    """[vocab, hidden] the weight that token ids go in through."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _vocabulary(model: PreTrainedModel) -> int:
    """How many logits the model gives per position."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"this {model.config.model_type} model has no language-model head; load a causal language model."
        )
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[0])


def _context_length(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return min(value, _same_angles(config) or value)
    raise ModelError(f"the configuration of this {config.model_type} model names no maximum context length.")


def _same_angles(config: Any) -> int | None:
    """Up to which length a token's angles are its own: "longrope" turns all tokens of a step by other ones as soon as
    one of them stands further back (Ding et al. 2024, LongRoPE)."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    name = "original_max_position_embeddings"
    length: int | None = rope.get(name) or getattr(config, name, None)
    return length


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configuration objects that the model's modules read their attention implementation from."""
    found: dict[int, Any] = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def _rounding(dtype: torch.dtype) -> float:
    """How far apart logits may be, relative to the largest, that were computed in another order."""
    return 1e-3 if dtype == torch.float32 else 0.1


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
