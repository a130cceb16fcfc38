"""Trains an EAGLE-3 head for a model, on answers of that model.

    python -m drafters.training.eagle --model smollm2-135m --data runs/distilled --output runs/eagle3

Collects the data first if the folder lacks any (see `drafters.training.distill`). An interrupted run goes on when the
same command is given again. The head with the best held-out acceptance length lies in OUTPUT/head, in the layout of
the `speculators` library, with a card.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from decoding.cli import exit_code
from decoding.engine.runner import embeddings
from decoding.errors import InvalidRequest
from decoding.models import LoadedModel, load_model
from drafters.heads.checkpoint import write_head
from drafters.heads.eagle import Eagle3Head, HeadConfig, default_layers
from drafters.training import distill, fit
from drafters.training.card import write_card
from drafters.training.corpus import Corpus, Document
from drafters.training.fit import Run, Schedule
from drafters.training.unroll import Unrolled


@dataclass(frozen=True)
class HeadOptions:
    """The head's size, and its training-time test.

    draft_vocab: the most frequent tokens of the answers, which the head can propose. layers: whose inputs it sees,
    none for the usual three. intermediate: width of its feed-forward part, 0 for the target's. steps: draft steps
    that are unrolled. decay: weight of a step's loss against the one before.
    """

    draft_vocab: int = 8192
    layers: tuple[int, ...] = ()
    intermediate: int = 0
    steps: int = 3
    decay: float = 0.8

    def __post_init__(self) -> None:
        if self.draft_vocab < 1 or self.steps < 1:
            raise InvalidRequest("draft_vocab and steps must be at least 1.")


def train(
    target: LoadedModel,
    options: HeadOptions,
    schedule: Schedule,
    data: Path,
    folder: Path,
    *,
    verifier: str | None = None,
) -> Run:
    """Train a head on the answers in `data` and leave the best in `folder`/head."""
    model = target.model
    layers = options.layers or default_layers(model.config.get_text_config().num_hidden_layers)
    options = replace(options, layers=layers)
    corpus, held_out = Corpus(data, layers), Corpus(data, layers, held_out=True)
    held_out.prepare(model)
    corpus.prepare(model)
    head = new_head(model, corpus, options, layers, target.name, schedule.seed)
    longest = max(len(d) for d in corpus.documents + held_out.documents)
    lm_head = model.get_output_embeddings().weight
    module = Unrolled(head, embeddings(model), lm_head, steps=options.steps, decay=options.decay, positions=longest)

    def export(module: nn.Module, run: Run) -> None:
        assert isinstance(module, Unrolled)
        write_head(module.head, folder / "head", verifier=verifier)
        write_card(folder / "head", "EAGLE-3 head", target.name, corpus, schedule, run, options)

    return fit.fit(
        module, corpus, held_out, schedule, folder, export, kind="eagle3", target=target.name, options=options
    )


def new_head(
    model: PreTrainedModel, corpus: Corpus, options: HeadOptions, layers: tuple[int, ...], name: str, seed: int
) -> Eagle3Head:
    """An untrained head that starts from the target: its last decoder layer, final norm and output rows.

    What has no counterpart of the same shape there is drawn at random. Fused features start as the highest layer's.
    """
    text = model.config.get_text_config()
    width = int(text.hidden_size)
    heads = int(text.num_attention_heads)
    rope = getattr(text, "rope_parameters", None) or {}
    layer = LlamaConfig(
        vocab_size=len(model.get_output_embeddings().weight),
        hidden_size=width,
        intermediate_size=options.intermediate or getattr(text, "intermediate_size", None) or 3 * width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or width // heads,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        max_position_embeddings=text.max_position_embeddings,
        rope_parameters=dict(rope) if "rope_theta" in rope else {"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = HeadConfig(
        layer,
        draft_vocab=min(options.draft_vocab, layer.vocab_size),
        target_hidden=width,
        layers=layers,
        target_layers=int(text.num_hidden_layers),
        fc_norm=True,  # residual streams of different depth differ in size by orders of magnitude
        target_model=name,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = Eagle3Head(config)
        for parameter in head.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
    head.use_tokens(frequent_tokens(corpus.documents, config.draft_vocab, config.vocab))
    _start_from(head, model)
    sample = corpus.states(corpus.documents[0]).features[1:, -1].float()  # the first token's are enormous
    with torch.no_grad():
        head.fc.weight[:, -width:] += torch.eye(width) * sample.pow(2).mean().sqrt()
    return head


@torch.no_grad()
def _start_from(head: Eagle3Head, model: PreTrainedModel) -> None:
    decoder = model.get_decoder()
    source = decoder.layers[-1].state_dict() if hasattr(decoder, "layers") else {}
    source = {name: tensor.float().cpu() for name, tensor in source.items()}
    source["hidden_norm.weight"] = source.pop("input_layernorm.weight", torch.empty(0))
    for name, own in head.layer.state_dict().items():
        theirs = source.get(name, torch.empty(0))
        if own.shape == theirs.shape:
            own.copy_(theirs)
        elif own.dim() == 2 and theirs.shape == (own.shape[0], own.shape[1] // 2):
            own[:, own.shape[1] // 2 :] = theirs  # what reads the hidden state
    output = model.get_output_embeddings().weight
    head.lm_head.weight.copy_(output[head.tokens.to(output.device)])
    norm = getattr(getattr(decoder, "norm", None), "weight", torch.empty(0))
    if norm.shape == head.norm.weight.shape:
        head.norm.weight.copy_(norm)


def frequent_tokens(documents: list[Document], count: int, vocab: int) -> torch.Tensor:
    """[count] the tokens that answers hold most often, sorted; the lowest ids fill up what is missing."""
    frequency = torch.zeros(vocab, dtype=torch.long)
    for document in documents:
        frequency += torch.bincount(document.tokens[document.prompt :], minlength=vocab)
    return frequency.argsort(descending=True, stable=True)[:count].sort().values


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m drafters.training.eagle", description=__doc__.split("\n")[0])
    distill.add_arguments(parser)
    fit.add_arguments(parser)
    default = HeadOptions()
    parser.add_argument("--data", type=Path, default=Path("runs/distilled"))
    parser.add_argument("--output", type=Path, default=Path("runs/eagle3"))
    parser.add_argument("--draft-vocab", type=int, default=default.draft_vocab)
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="whose inputs the head sees")
    parser.add_argument("--intermediate", type=int, default=default.intermediate)
    parser.add_argument("--steps", type=int, default=default.steps, help="draft steps that are unrolled")
    parser.add_argument("--decay", type=float, default=default.decay)
    parser.add_argument("--verifier", help="the target's hub id, for the `speculators` library and vLLM")
    arguments = parser.parse_args()
    options = HeadOptions(
        arguments.draft_vocab, tuple(arguments.layers), arguments.intermediate, arguments.steps, arguments.decay
    )
    distill.collect(distill.parse(arguments), arguments.data)
    run = train(
        load_model(arguments.model), options, fit.parse(arguments), arguments.data, arguments.output,
        verifier=arguments.verifier,
    )  # fmt: skip
    print(json.dumps({"head": str(arguments.output / "head"), "acceptance_length": run.best, "steps": run.steps}))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
