"""Trains Medusa heads for a model, on answers of that model.

    python -m drafters.training.medusa --model smollm2-135m --data runs/distilled --output runs/medusa

Data, resumption and the result's place are as in `drafters.training.eagle`. The target stays as it is (Medusa-1).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoding.cli import exit_code
from decoding.errors import InvalidRequest
from decoding.models import LoadedModel, load_model
from drafters.heads.eagle import default_layers
from drafters.heads.medusa import MedusaConfig, MedusaHeads, write_medusa
from drafters.training import distill, fit
from drafters.training.batches import Batch
from drafters.training.card import write_card
from drafters.training.corpus import Corpus
from drafters.training.eagle import frequent_tokens
from drafters.training.fit import Run, Schedule
from drafters.training.unroll import Outcome


@dataclass(frozen=True)
class MedusaOptions:
    """heads: tokens that are foreseen. draft_vocab: the most frequent tokens of the answers, which can be. decay:
    weight of a head's loss against the one before."""

    heads: int = 4
    draft_vocab: int = 8192
    decay: float = 0.8

    def __post_init__(self) -> None:
        if self.heads < 1 or self.draft_vocab < 1:
            raise InvalidRequest("heads and draft_vocab must be at least 1.")


class MedusaLoss(nn.Module):
    """The heads with their loss: Σ decay^k · cross entropy with what the target says k + 1 tokens later."""

    output: Tensor
    known: Tensor

    def __init__(self, heads: MedusaHeads, output: Tensor, decay: float) -> None:
        super().__init__()
        self.heads, self.decay = heads, decay
        tokens = heads.tokens.to(output.device)
        self.register_buffer("output", output.detach()[tokens], persistent=False)
        self.register_buffer("known", torch.zeros(len(output), dtype=torch.bool), persistent=False)
        self.known[heads.tokens] = True

    def forward(self, batch: Batch, steps: int | None = None) -> Outcome:
        """steps: of validation; heads that there are not foresee nothing."""
        valid = batch.valid  # [B, R]
        place = torch.full(valid.shape, -1, device=valid.device)  # [B, R] row of `final`, one position later
        place[valid] = torch.arange(len(batch.final), device=valid.device)
        with torch.no_grad():
            wanted = F.linear(batch.final, self.output).softmax(-1)
            known = self.known[batch.greedy]
        logits = self.heads(batch.final)  # [M, heads, draft vocab]
        count = self.heads.config.heads
        hits = torch.zeros(steps or count, *valid.shape, dtype=torch.bool, device=valid.device)
        loss = logits.new_zeros(())
        for head in range(count):
            # Row j holds the state one position after place j, so its first guess is what row j + 1 says.
            target = F.pad(place[:, 1 + head :], (0, min(1 + head, valid.shape[1])), value=-1)
            exists = target >= 0
            here, there = place[exists], target[exists]
            drafted = logits[here, head]
            if head < len(hits):
                right = torch.zeros_like(valid)
                right[exists] = self.heads.tokens[drafted.argmax(-1)] == batch.greedy[there]
                hits[head, :, 1:] = right[:, :-1]
            teaches = known[there]
            entropy = drafted.logsumexp(-1) - (wanted[there] * drafted).sum(-1)
            loss = loss + self.decay**head * (entropy * teaches).sum() / teaches.sum().clamp(min=1)
        return Outcome(loss, hits)


def train(target: LoadedModel, options: MedusaOptions, schedule: Schedule, data: Path, folder: Path) -> Run:
    """Train heads on the answers in `data` and leave the best in `folder`/head."""
    model = target.model
    layers = default_layers(
        model.config.get_text_config().num_hidden_layers
    )  # so that an EAGLE-3 run on the same data finds its states
    corpus, held_out = Corpus(data, layers), Corpus(data, layers, held_out=True)
    held_out.prepare(model)
    corpus.prepare(model)
    heads = new_heads(target, corpus, options)
    output = model.get_output_embeddings().weight

    def export(module: nn.Module, run: Run) -> None:
        assert isinstance(module, MedusaLoss)
        write_medusa(module.heads, folder / "head")
        write_card(folder / "head", "Medusa heads", target.name, corpus, schedule, run, options)

    module = MedusaLoss(heads, output, options.decay)
    return fit.fit(
        module, corpus, held_out, schedule, folder, export, kind="medusa", target=target.name, options=options
    )


def new_heads(target: LoadedModel, corpus: Corpus, options: MedusaOptions) -> MedusaHeads:
    """Untrained heads: every one says what the target says, as in the paper."""
    text = target.model.config.get_text_config()
    output = target.model.get_output_embeddings().weight
    config = MedusaConfig(
        heads=options.heads,
        draft_vocab=min(options.draft_vocab, len(output)),
        target_hidden_size=int(text.hidden_size),
        vocab_size=len(output),
        target_num_hidden_layers=int(text.num_hidden_layers),
        target_model=target.name,
    )
    heads = MedusaHeads(config)
    with torch.no_grad():
        heads.tokens.copy_(frequent_tokens(corpus.documents, config.draft_vocab, config.vocab_size))
        heads.output.weight.copy_(output[heads.tokens.to(output.device)])
        for block in heads.blocks:
            assert isinstance(block, nn.Linear)
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
    return heads


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m drafters.training.medusa", description=__doc__.split("\n")[0])
    distill.add_arguments(parser)
    fit.add_arguments(parser)
    default = MedusaOptions()
    parser.add_argument("--data", type=Path, default=Path("runs/distilled"))
    parser.add_argument("--output", type=Path, default=Path("runs/medusa"))
    parser.add_argument("--heads", type=int, default=default.heads)
    parser.add_argument("--draft-vocab", type=int, default=default.draft_vocab)
    parser.add_argument("--decay", type=float, default=default.decay)
    arguments = parser.parse_args()
    options = MedusaOptions(arguments.heads, arguments.draft_vocab, arguments.decay)
    distill.collect(distill.parse(arguments), arguments.data)
    run = train(load_model(arguments.model), options, fit.parse(arguments), arguments.data, arguments.output)
    print(json.dumps({"head": str(arguments.output / "head"), "acceptance_length": run.best, "steps": run.steps}))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
