"""Which trained head belongs to which model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from decoding.engine.runner import Runner
from decoding.errors import ModelError
from drafters.heads.checkpoint import read_config

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).resolve().parents[1] / "weights"
"""One folder per head that comes with the project."""


@dataclass(frozen=True)
class Sizes:
    """What a head must share with its target. layers: decoder layers; None where a head does not say."""

    hidden: int
    vocab: int
    layers: int | None

    @classmethod
    def of(cls, runner: Runner) -> Sizes:
        """Those of a target."""
        return cls(int(runner.config.hidden_size), runner.vocab, int(runner.config.num_hidden_layers))

    def fit(self, target: Sizes) -> bool:
        """Whether a head of these sizes can draft for such a target."""
        return (self.hidden, self.vocab) == (target.hidden, target.vocab) and self.layers in (None, target.layers)

    def __str__(self) -> str:
        layers = "" if self.layers is None else f", {self.layers} layers"
        return f"hidden size {self.hidden}, a vocabulary of {self.vocab}{layers}"


@dataclass(frozen=True)
class ShippedHead:
    """A head that comes with the project. kind: the drafter that runs it ("eagle3", "medusa"). model: the name of the
    one that it was trained for, where it says so."""

    kind: str
    model: str | None
    sizes: Sizes
    folder: Path

    def __str__(self) -> str:
        return f"a head for {self.model or 'models'} ({self.sizes})"


def require_fit(folder: Path | str, head: Sizes, backend: LocalBackend) -> None:
    """Raise ModelError, naming the sizes, unless the head was made for such a model."""
    target = Sizes.of(backend.engine.runner)
    if not head.fit(target):
        raise ModelError(
            f"the head in {folder} is made for a model with {head}, and {backend.name} has {target}; use a head that "
            "was trained for it."
        )


def shipped_heads() -> list[ShippedHead]:
    """Every head that comes with the project."""
    heads = []
    for file in sorted(SHIPPED.glob("*/config.json")):
        values = read_config(file.parent)
        layer = values.get("transformer_layer_config") or {}
        sizes = Sizes(
            values.get("target_hidden_size") or layer.get("hidden_size", 0),
            layer.get("vocab_size", 0) or values.get("vocab_size", 0),
            values.get("target_num_hidden_layers"),
        )
        kind = values.get("speculators_model_type", values.get("head_type"))
        heads.append(ShippedHead(str(kind), values.get("target_model"), sizes, file.parent))
    return heads


def shipped_head(kind: str, backend: LocalBackend) -> Path:
    """The folder of the head of this kind ("eagle3", "medusa") that comes with the project for a model.

    A model is known by its sizes; where several heads fit, by its name. Raises ModelError if there is none.
    """
    target = Sizes.of(backend.engine.runner)
    fitting = [head for head in shipped_heads() if head.kind == kind and head.sizes.fit(target)]
    if not fitting:
        raise ModelError(
            f"no {kind} head is shipped for {backend.name} ({target}); train one with `python -m "
            f"drafters.training.{kind.rstrip('3')} --model …` and name its folder: {kind}(head=FOLDER)."
        )
    head = min(fitting, key=lambda head: (head.model != backend.name, head.folder))
    if head.model != backend.name:
        logger.info("%s has the sizes of the model that the head in %s was trained for.", backend.name, head.folder)
    return head.folder
