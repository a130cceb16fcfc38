"""What a masked checkpoint declares, and how published ones are read without the code they ship.

A masked model fills in mask tokens that it sees beside real ones, instead of continuing a text. Where it is a Llama or
Qwen in shape, which of its attention is causal is the engine's business and not the weights': it is loaded as the
plain transformers class, and run with the attention it was trained for.

    model_type            mask id                attention                        logit that predicts place i
    llada                 mask_token_id          everything sees everything       i
    Dream                 mask_token_id          everything sees everything       i - 1
    sdar                  the tokenizer's        blocks of block_size (4)         i
    Fast_dLLM_Qwen        151665                 blocks of bd_size (32)           i - 1
    *ForMaskedLM          the tokenizer's        everything sees everything       i
    any, with `masked`    what the section `masked` of config.json says

An encoder-decoder with the section `masked` (CMLMs; no published kind has a declaration of its own) reads the prompt
with its encoder, and its decoder fills the answer in.

Not supported: transformers' `diffusion_gemma`. Its decoder attends to keys and values of a separate encoder tower, is
conditioned on its own last logits, and starts from random tokens where masked models have a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decoding.checkpoint import quiet_transformers
from decoding.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Masking:
    """How to fill masks in with a model.

    mask: id of the mask token. span: how far attention looks ahead, as in `Decoder.span`: 0 everywhere, n to the end
    of each block of n positions. shift: whether the logit of place i - 1 predicts place i, as in causal models, instead
    of its own. lengths: ids of the tokens that announce an answer of 1, 2, 3 … tokens; empty if the model has none.
    encoder: whether the prompt is read by an encoder, and the decoder sees the answer alone.
    """

    mask: int
    span: int
    shift: bool = False
    lengths: tuple[int, ...] = ()
    encoder: bool = False


# The transformers class that a published kind is in shape, by its model_type in lower case.
_SHAPES = {"llada": "llama", "dream": "qwen2", "sdar": "qwen3", "fast_dllm_qwen": "qwen2"}
# Where block-causal kinds say how long their blocks are, and how long they are if they do not.
_BLOCK_SIZES = {"sdar": ("block_size", 4), "fast_dllm_qwen": ("bd_size", 32)}

_LLADA_FIELDS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "embedding_size": "vocab_size",
}
_LLADA_WEIGHTS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}


def masking_of(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Masking | None:
    """What a checkpoint's configuration says of its masks, or None for a causal model.

    vocabulary: how many tokens the model knows. Raises ModelError for a masked one whose mask token cannot be found, or
    whose declaration is no such thing.
    """
    kind = str(config.get("model_type", "")).lower()
    if "masked" in config:
        return _from_section(config["masked"], vocabulary, bool(config.get("is_encoder_decoder")))
    encoder = any(str(name).endswith("ForMaskedLM") for name in config.get("architectures") or ())
    if kind not in _SHAPES and not encoder:
        return None
    mask = config.get("mask_token_id")
    if mask is None:
        mask = tokenizer.mask_token_id
    if mask is None and kind == "fast_dllm_qwen":
        mask = 151665
    if kind not in _BLOCK_SIZES:
        return _checked(Masking(mask, 0, shift=kind == "dream"), vocabulary)
    option, usual = _BLOCK_SIZES[kind]
    span = config.get(option, usual)
    return _checked(Masking(mask, span, shift=kind == "fast_dllm_qwen"), vocabulary, block_size=option)


def _from_section(section: Any, vocabulary: int, encoder: bool) -> Masking:
    """The section `masked` of a config.json: mask_token_id, attention ("bidirectional", or "block-causal" with a
    block_size), shift, length_token_ids."""
    if not isinstance(section, Mapping) or section.get("attention") not in ("bidirectional", "block-causal"):
        raise ModelError(
            "the section 'masked' of config.json needs an attention, 'bidirectional' or 'block-causal', and a "
            "mask_token_id."
        )
    lengths = section.get("length_token_ids", [])
    if not isinstance(lengths, list):
        raise ModelError(f"length_token_ids in config.json must be a list of token ids, not {lengths!r}.")
    mask: Any = section.get("mask_token_id")
    shift = section.get("shift", False)
    if section["attention"] == "bidirectional":
        return _checked(Masking(mask, 0, shift, tuple(lengths), encoder), vocabulary)
    masking = Masking(mask, section.get("block_size", 0), shift, tuple(lengths), encoder)
    return _checked(masking, vocabulary, block_size="block_size")


def _checked(masking: Masking, vocabulary: int, block_size: str | None = None) -> Masking:
    """`masking` as it was read, if a model of so many tokens can be run with it; else raises ModelError.

    block_size: the option that says how long the blocks of block-causal attention are; None for bidirectional.
    """
    if masking.mask is None:
        raise ModelError(
            "this model names no mask token, so nothing can be filled in; set mask_token_id in its config.json."
        )
    for option, ids in (("mask_token_id", [masking.mask]), ("length_token_ids", masking.lengths)):
        for token in ids:
            if type(token) is not int or not 0 <= token < vocabulary:
                raise ModelError(f"{option} is {token!r}, which is no id below {vocabulary}; set it in config.json.")
    if len(set(masking.lengths)) < len(masking.lengths):
        raise ModelError("the length_token_ids in config.json must differ: each token announces one length.")
    if type(masking.shift) is not bool:
        raise ModelError(f"shift in config.json must be true or false, not {masking.shift!r}.")
    if block_size is not None and (type(masking.span) is not int or masking.span < 2):
        raise ModelError(
            f"block-causal attention needs a {block_size} of at least 2 in config.json, not {masking.span!r}."
        )
    if block_size is not None and masking.encoder:
        raise ModelError(
            "an encoder-decoder fills answers in at once: its attention in config.json is 'bidirectional'."
        )
    return masking


def read_masked(source: str, config: Mapping[str, Any], **options: Any) -> PreTrainedModel | None:
    """The model of a published masked kind, of a masked encoder or encoder-decoder; None if it loads like any causal
    model.

    options: as `from_pretrained` takes them. Code that the checkpoint ships is not run. Raises ModelError if weights
    are missing or do not fit.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        PreTrainedModel,
    )

    kind = str(config.get("model_type", "")).lower()
    if kind == "diffusion_gemma":
        raise ModelError(
            "diffusion_gemma models cannot be run: their decoder reads the cache of a second tower and is conditioned "
            "on its own last logits; use a masked model such as LLaDA, Dream, SDAR or Fast-dLLM v2."
        )
    with quiet_transformers():
        if kind in _SHAPES:
            fields = {k: v for k, v in config.items() if k not in ("model_type", "auto_map", "architectures")}
            renames: dict[str, str] | None = None
            if kind == "llada":
                fields = _llada_fields(fields)
                renames = _LLADA_WEIGHTS
            if kind == "sdar":
                fields["use_sliding_window"] = False
            shape = AutoConfig.for_model(_SHAPES[kind], **fields)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, config=shape, key_mapping=renames, output_loading_info=True, **options
            )
        elif any(str(name).endswith("ForMaskedLM") for name in config.get("architectures") or ()):
            if any(config.get(option) for option in ("local_attention", "sliding_window")):
                raise ModelError(
                    f"this {kind} model sees a window on both sides of a token, and the engine's lie before it; "
                    "use an encoder with full attention."
                )
            loaded = AutoModelForMaskedLM.from_pretrained(source, output_loading_info=True, **options)
        elif config.get("is_encoder_decoder") and "masked" in config:
            loaded = AutoModelForSeq2SeqLM.from_pretrained(source, output_loading_info=True, **options)
        else:
            return None
    model, report = loaded
    if absent := sorted(map(str, report["missing_keys"] or report["mismatched_keys"])):
        raise ModelError(f"the weights in {source} do not fit its configuration: {absent[0]} is missing or misshapen.")
    assert isinstance(model, PreTrainedModel)
    return model


def _llada_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """LLaDA's configuration in Llama's words. Raises ModelError for variants that a Llama has no place for."""
    for option, allowed in (("block_type", "llama"), ("layer_norm_type", "rms"), ("activation_type", "silu")):
        if fields.get(option, allowed) != allowed:
            raise ModelError(f"this LLaDA model has {option}={fields[option]!r}, which is not Llama-shaped.")
    renamed = {_LLADA_FIELDS.get(name, name): value for name, value in fields.items() if name != "vocab_size"}
    renamed.setdefault("vocab_size", fields.get("vocab_size"))
    return {**renamed, "num_key_value_heads": renamed.get("num_key_value_heads") or renamed["num_attention_heads"]}
