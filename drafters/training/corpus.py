"""Collected answers as documents, and the target's hidden states for them.

Hidden states are computed by one forward pass per document and kept beside each shard in half precision. On a CPU
that pass costs about as much as a training step, so it is worth making once and not in every epoch; and as it is made
here rather than while answers are collected, other layers need no new answers. Nobody is bound to keep the files:
whatever is missing is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from decoding.engine.runner import embeddings
from decoding.errors import RecordError
from drafters.training.distill import HELD_OUT

_TOGETHER = 8  # documents per forward pass


@dataclass(frozen=True, eq=False)
class Document:
    """One answer. tokens: [n] prompt and answer. prompt: tokens of the prompt. shard, start: where it is stored."""

    tokens: Tensor
    prompt: int
    shard: int
    start: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def supervised(self) -> int:
        """Answer tokens behind the first, which is the target's own."""
        return len(self.tokens) - self.prompt - 1


@dataclass(frozen=True)
class States:
    """The target's states over n tokens.

    features: [n, layers, hidden] what the layers asked for receive. final: [n, hidden] what its language-model
    head receives. greedy: [n] its most likely next token.
    """

    features: Tensor
    final: Tensor
    greedy: Tensor


class Corpus:
    """The documents of a folder that `drafters.training.distill` filled, held out or to train on.

    layers: whose inputs the features are. longest: documents are cut to so many tokens. model: the name of the one
    whose answers they are.
    """

    def __init__(self, folder: Path, layers: tuple[int, ...], *, held_out: bool = False, longest: int = 1024) -> None:
        self.layers = layers
        self.shards = [folder / HELD_OUT] if held_out else sorted(folder.glob("shard-*.safetensors"))
        if not self.shards or not self.shards[0].exists():
            raise RecordError(f"{folder} holds no answers; collect some with `python -m drafters.training.distill`.")
        with safe_open(self.shards[0], framework="pt") as first:
            self.model = str((first.metadata() or {}).get("model"))
        self.documents: list[Document] = []
        for i, shard in enumerate(self.shards):
            tensors = load_file(shard)
            start = 0
            for length, prompt in zip(tensors["lengths"].tolist(), tensors["prompts"].tolist(), strict=True):
                tokens = tensors["tokens"][start : start + length].long()
                document = Document(tokens[:longest], prompt, i, start)
                if document.supervised > 0:
                    self.documents.append(document)
                start += length
        self._open: dict[int, safe_open] = {}

    def _states_file(self, shard: int) -> Path:
        name = "-".join(map(str, self.layers))
        return self.shards[shard].with_name(f"states-{name}-{self.shards[shard].name}")

    def states(self, document: Document) -> States:
        """The target's states over a document; `prepare` must have run."""
        if document.shard not in self._open:
            self._open[document.shard] = safe_open(self._states_file(document.shard), framework="pt")
        file = self._open[document.shard]
        span = slice(document.start, document.start + len(document))
        return States(
            features=file.get_slice("features")[span],
            final=file.get_slice("final")[span],
            greedy=file.get_slice("greedy")[span].long(),
        )

    def prepare(self, model: PreTrainedModel) -> None:
        """Compute the states of every shard that has none yet."""
        missing = [i for i in range(len(self.shards)) if not self._states_file(i).exists()]
        for i in track(missing, "hidden states", disable=not missing):
            self._compute(i, model)

    def _compute(self, shard: int, model: PreTrainedModel) -> None:
        members = [d for d in self.documents if d.shard == shard]
        total = int(load_file(self.shards[shard])["lengths"].sum())
        width = model.config.get_text_config().hidden_size
        features = torch.zeros(total, len(self.layers), width, dtype=torch.float16)
        final = torch.zeros(total, width, dtype=torch.float16)
        greedy = torch.zeros(total, dtype=torch.int32)
        members.sort(key=len)
        for at in range(0, len(members), _TOGETHER):
            some = members[at : at + _TOGETHER]
            for document, states in zip(some, compute_states(model, some, self.layers), strict=True):
                span = slice(document.start, document.start + len(document))
                features[span], final[span], greedy[span] = states.features, states.final, states.greedy.int()
        file = self._states_file(shard)
        part = file.with_suffix(".part")
        save_file({"features": features, "final": final, "greedy": greedy}, part)
        part.replace(file)


@torch.inference_mode()
def compute_states(model: PreTrainedModel, documents: List[Document], layers: tuple[int, ...]) -> list[States]:
    """Run the target over a few documents at once, padded to the longest."""
    longest = max(map(len, documents))
    tokens = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, document in enumerate(documents):
        tokens[i, : len(document)], mask[i, : len(document)] = document.tokens, 1
    device = embeddings(model).device
    out = model.get_decoder()(
        input_ids=tokens.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False
    )
    found = []
    for i, document in enumerate(documents):
        n = len(document)
        final = out.last_hidden_state[i, :n]
        # Only what is learned from needs the whole vocabulary.
        greedy = torch.zeros(n, dtype=torch.long)
        greedy[document.prompt :] = model.get_output_embeddings()(final[document.prompt :]).argmax(-1).cpu()
        features = torch.stack([out.hidden_states[layer][i, :n] for layer in layers], dim=1)
        found.append(States(_half(features), _half(final), greedy))
    return found


def _half(x: Tensor) -> Tensor:
    """Half precision on the host; the few enormous activations that language models have are cut at its limit."""
    limit = torch.finfo(torch.float16).max
    return x.float().clamp(-limit, limit).to(torch.float16).cpu()
