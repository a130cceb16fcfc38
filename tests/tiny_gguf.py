"""Writing a tiny Llama and its tokenizer as a GGUF file, the way llama.cpp's converter lays it out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedModel

from tests.tiny import byte_alphabet, tiny_model

TOKENS = [*byte_alphabet(), "he", "in", "<bos>", "<eos>", "<turn>"]
BOS, EOS, TURN = 258, 259, 260
TEMPLATE = "{% for message in messages %}<turn>{{ message.content }}{% endfor %}"


def tiny_llama(seed: int = 2) -> PreTrainedModel:
    """The model that `write_gguf` expects: a llama with the vocabulary `TOKENS`."""
    return tiny_model("llama", seed, vocab_size=len(TOKENS), bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write `model` in float32, with a turn's end apart from the text's, as chat models have it."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL if token.startswith("<") and token != "<" else 1 for token in TOKENS])
    writer.add_token_merges(["h e", "i n"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(TURN)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        writer.add_tensor(_name(name), _laid_out(name, weight, config.num_attention_heads, config.num_key_value_heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _laid_out(name: str, weight: torch.Tensor, heads: int, kv_heads: int) -> np.ndarray:
    """llama.cpp rotates neighboring pairs of a head where Hugging Face rotates its two halves."""
    array = weight.detach().float().numpy()
    if "q_proj" not in name and "k_proj" not in name:
        return array
    count = heads if "q_proj" in name else kv_heads
    halves = array.reshape(count, 2, -1, array.shape[1])  # [heads, 2, head_dim / 2, hidden]
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
