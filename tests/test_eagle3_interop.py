"""EAGLE-3 heads against the `speculators` library; left out where that is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from decoding.engine.runner import embeddings
from drafters.heads.checkpoint import read_head, write_head
from tests.heads import SMALL, random_head, slow_draft
from tests.tiny import tiny_model

pytest.importorskip("speculators")

FLAGS = ["", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"]
STEPS, LENGTH = 4, 9


def library_logits(model: Any, features: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Draft logits [LENGTH, draft vocab] of every step, the text's own tokens being the guesses."""
    found: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: found.append(output[0].detach()))
    with torch.no_grad():
        model(
            hidden_states=features.flatten(1)[None],
            input_ids=tokens[None, 1:],
            document_ids=torch.zeros(1, LENGTH, dtype=torch.long),
            ttt_steps=STEPS,
        )
    hook.remove()
    return found


def compare(model: Any, folder: Path) -> None:
    """The library's model and the head that is read from `folder` say the same."""
    head = read_head(folder, 3)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 12, (LENGTH + 1,), generator=generator)
    features = torch.randn(LENGTH, 2, 32, generator=generator)
    theirs = library_logits(model, features, tokens)
    text = tokens.tolist()
    embeddings = model.embed_tokens.weight.detach()
    compared = 0
    for at in range(LENGTH - STEPS):
        ours = slow_draft(head, embeddings, text[: at + 2], features, text[at + 2 : at + 1 + STEPS])
        for step in range(STEPS):
            assert torch.allclose(ours[step], theirs[step][at], atol=1e-4), (at, step)
            compared += 1
    assert compared == STEPS * (LENGTH - STEPS)
    (head.layer.self_attn.o_proj.weight.data).mul_(1.01)  # the negative control
    ours = slow_draft(head, embeddings, text[:2], features, [])
    assert not torch.allclose(ours[0], theirs[0][0], atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("flag", FLAGS)
def test_a_head_of_the_library_gives_the_same_draft_logits_here(flag: str, kind: str, tmp_path: Path) -> None:
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig, Qwen3Config

    layer = {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind](
        vocab_size=12,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    layer._attn_implementation = "eager"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=9,
        eagle_aux_hidden_state_layer_ids=[1, 2],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
        **({flag: True} if flag else {}),
    )
    model = Eagle3DraftModel(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    known = torch.tensor([0, 1, 3, 4, 6, 7, 8, 10, 11])
    model.load_vocab_mappings(torch.zeros(12, dtype=torch.bool).index_fill(0, known, True), known - torch.arange(9))
    model.eval().save_pretrained(tmp_path)
    compare(model, tmp_path)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_head_written_here_loads_there(flag: str, tmp_path: Path) -> None:
    from speculators import SpeculatorModelConfig
    from speculators.models.eagle3 import Eagle3DraftModel

    target = tiny_model(**SMALL)
    target.save_pretrained(tmp_path / "target")
    head = random_head(target, **({flag: True} if flag else {}))
    write_head(head, tmp_path, verifier=str(tmp_path / "target"), dtype=torch.float32)
    config = SpeculatorModelConfig.from_pretrained(tmp_path)
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel.from_pretrained(tmp_path, config=config)
    # The library takes the target's embeddings over where its own hold a NaN, but transformers may leave them holding
    # whatever was in memory.
    model.embed_tokens.weight.data = embeddings(target).detach().clone()
    compare(model.eval().float(), tmp_path)
