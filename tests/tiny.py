"""Tiny random language models of every kind the engine meets, and a tokenizer, made in memory.

Deterministic, float32, on the CPU. Weights are drawn wider than for training, so that the most likely
token depends on the whole context and greedy answers wander instead of repeating one token.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    set_seed,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

KINDS = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "qwen3-moe", "mamba")
"""Every kind; the last, a recurrent model, cannot roll back and is there to be refused."""

VOCABULARY = 259
"""Token ids of `tiny_tokenizer`: 256 bytes, then these three."""
BOS, EOS, TURN = 256, 257, 258

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "initializer_range": 0.3,
}


def tiny_config(kind: str, **overrides: Any) -> PretrainedConfig:
    """The configuration of `tiny_model`; `overrides` are entries of the kind's own configuration class."""
    if kind == "llama":
        return LlamaConfig(**_SHAPE | overrides)
    if kind == "qwen3":
        return Qwen3Config(**_SHAPE | overrides)
    if kind == "mistral":
        return MistralConfig(**_SHAPE | {"sliding_window": 8} | overrides)
    if kind == "gemma3":  # two layers that see 8 tokens, one that sees all, and two again
        layers = {"num_hidden_layers": 5, "sliding_window": 8, "sliding_window_pattern": 3}
        # untied, because an embedding this wide and tied to the output makes every token repeat itself
        head = {"tie_word_embeddings": False, "query_pre_attn_scalar": 8}
        return Gemma3TextConfig(**_SHAPE | layers | head | overrides)
    if kind == "qwen3-moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        return Qwen3MoeConfig(**_SHAPE | experts | overrides)
    if kind == "gpt2":  # learned positions, tied embeddings
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        shape = {names.get(key, key): value for key, value in _SHAPE.items()}
        return GPT2Config(**shape | {"n_positions": 512, "initializer_range": 0.6} | overrides)
    if kind == "mamba":
        return MambaConfig(**_SHAPE | {"state_size": 8} | overrides)
    raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")


def tiny_model(kind: str = "llama", seed: int = 2, **overrides: Any) -> PreTrainedModel:
    """A random model of the given kind, in evaluation mode; the same for the same arguments."""
    state = torch.get_rng_state()
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **overrides), dtype=torch.float32)
    torch.set_rng_state(state)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = EOS
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, with a chat template; any text survives a round trip."""
    alphabet = byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=["<turn>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}<turn>{{ message.role }}\n{{ message.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    return fast


def byte_alphabet() -> list[str]:
    """Byte-level BPE's printable character for every byte (Radford et al. 2019): itself, or one from U+0100 up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]
