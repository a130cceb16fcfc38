"""A router trained on the served model's own hidden states: one linear layer behind one forward pass of the question.

`python -m experiments.train_router` trains a head; those of models that this package knows lie in `heads/`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from decoding.backends.base import Backend
from decoding.engine.runner import embeddings
from decoding.errors import CapabilityError, InvalidRequest, ModelError
from decoding.strategies.router.base import Route, Router, computation
from decoding.types import Message

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend

SHIPPED = Path(__file__).parent / "heads"


@dataclass(frozen=True)
class Classifier(Router):
    """A trained head on the model's hidden states.

    head: a .safetensors file that `experiments.train_router` wrote; "" takes the shipped one that fits the model.
    threshold: how probable it must be that a list suits the question; a higher one sends fewer questions astray.
    """

    head: str = ""
    threshold: float = 0.5

    name: ClassVar[str] = "classifier"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "tokens"})

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise InvalidRequest(f"threshold must lie between 0 and 1, not {self.threshold!r}.")

    async def route(
        self, question: str, history: Sequence[Message], backend: Backend, templates: str | None = None
    ) -> Route:
        from decoding.backends.local import LocalBackend

        if not isinstance(backend, LocalBackend):
            raise CapabilityError(f"{backend.name} shows no hidden states; use router=prompt for it.")
        head = _head(self.head, backend)
        began = time.perf_counter()
        features, tokens = question_features(backend, question, head.card.layers)
        chance = head.probability(features)
        cost = computation(time.perf_counter() - began, tokens)
        return Route.chosen(chance >= self.threshold, f"probability of a list {chance:.2f}", cost)


@dataclass(frozen=True)
class HeadCard:
    """Where a head comes from and how good it is.

    model: whose hidden states it reads. layers: which, as numbers of decoder layers passed (0: embeddings).
    questions, positive: how many it was trained on, and how many of them want a list.
    accuracy, precision, recall: cross-validated on those; always_no: the accuracy of routing nothing.
    source: the file of questions.
    """

    model: str
    layers: tuple[int, ...]
    questions: int
    positive: int
    accuracy: float
    precision: float
    recall: float
    always_no: float
    source: str = ""


@dataclass(frozen=True)
class Head:
    """Logistic regression on the features of `question_features`.

    weight: [features], bias: [] (standardisation is folded in). mark: [64] some of the embedding's values, by which
    the model it was trained on is recognised.
    """

    card: HeadCard
    weight: torch.Tensor
    bias: torch.Tensor
    mark: torch.Tensor = field(default_factory=lambda: torch.zeros(64))

    def probability(self, features: torch.Tensor) -> float:
        """That a list suits the question. features: [features]."""
        return float(torch.sigmoid(features.float() @ self.weight + self.bias))

    def fits(self, backend: LocalBackend) -> bool:
        """Whether it was trained on this model, whatever precision it is loaded in."""
        mark = model_mark(backend)
        width = len(self.weight) // len(self.card.layers)
        same = torch.cosine_similarity(mark, self.mark, dim=0) > 0.99
        return bool(same) and width == backend.engine.runner.config.hidden_size

    def save(self, path: Path) -> None:
        """Write the head, and its card beside it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight.float(), "bias": self.bias.float(), "mark": self.mark.float()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        path.with_suffix(".json").write_text(json.dumps(asdict(self.card), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Head:
        """Raises ModelError for a file that is missing or no head."""
        try:
            card: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("weight", "bias", "mark")}
            return cls(HeadCard(**{**card, "layers": tuple(card["layers"])}), **tensors)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ModelError(f"{path} and its .json are no router head: {error}.") from error


@torch.inference_mode()
def question_features(backend: LocalBackend, question: str, layers: Sequence[int]) -> tuple[torch.Tensor, int]:
    """[len(layers) · hidden] hidden states where the answer would begin, and how many tokens were read for them.

    The question goes through the chat template, as for a plain answer: the state in which the model is about to
    answer tells more about the answer's form than the states of the question's own words.
    """
    ids = backend.encode(question)[-backend.engine.cache.capacity :]
    tokens = torch.tensor([ids], device=backend.device)
    states = backend.model.base_model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0, -1].float().cpu() for layer in layers]), len(ids)


def model_mark(backend: LocalBackend) -> torch.Tensor:
    """[64] values from all over the embedding: alike for one model in any precision, unlike for another one."""
    values = embeddings(backend.model).detach().flatten()
    return values[:: max(len(values) // 64, 1)][:64].float().cpu()


@lru_cache(maxsize=8)
def _load(path: Path) -> Head:
    return Head.load(path)


def _head(name: str, backend: LocalBackend) -> Head:
    """The named head, or the shipped one that fits. Raises ModelError if there is none."""
    paths = [Path(name).expanduser()] if name else sorted(SHIPPED.glob("*.safetensors"))
    for path in paths:
        if (head := _load(path)).fits(backend):
            return head
    train = "`python -m experiments.train_router` trains one, and router=prompt needs none."
    if name:
        raise ModelError(f"the router head {name} was trained on another model than {backend.name}; {train}")
    raise ModelError(f"no router head is shipped for {backend.name}; {train}")
