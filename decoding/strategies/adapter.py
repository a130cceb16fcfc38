"""LoRA adapters: where they are found, whether they fit the model, and a backend that runs the adapted model.

Hu et al. 2021, "LoRA". Files are those of the peft library (`adapter_config.json`, `adapter_model.safetensors`), read
without it. An adapter is merged once into a model that shares every other tensor with the backend's own, and runs on
a runner of its own with its own slots: the backend's model stays as it is, and both can decode in turn.
"""

from __future__ import annotations

import copy
import importlib.resources
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from decoding.engine.runner import embeddings
from decoding.errors import ModelError, UnknownName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from decoding.backends.local import LocalBackend

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "training.json"
"""Files of an adapter's folder. The card says how it was trained, and holds the `fingerprint` of the model that it
was trained for; adapters from elsewhere have none."""

_FINGERPRINT = 16  # entries of the embedding
_PREFIX = "base_model.model."
_LIKENESS = 0.02  # relative difference that another precision of the same model may make


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates: module name → (A [rank, in], B [out, rank], scale), so that W becomes W + scale · B A."""

    folder: Path
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]
    fingerprint: tuple[float, ...] | None = None


def shipped_adapters() -> dict[str, Path]:
    """The adapters that come with the package: their names and folders."""
    folder = Path(str(importlib.resources.files("decoding") / "adapters"))
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}


def adapted(backend: LocalBackend, name: str) -> LocalBackend:
    """A backend that runs `backend`'s model with an adapter merged into it; made once for each, and again when its
    files are no longer those that it was made from.

    Raises UnknownName if there is no such adapter, ModelError if it cannot be read or is for another model.
    """
    if backend.variant == name:
        return backend
    files = _stamp(_found(name))
    if name not in backend.variants or backend.variants[name].files != files:
        fused = backend.engine.runner.fused
        variant = type(backend)(
            merged(backend.model, load_adapter(name)),
            backend.tokenizer,
            name=f"{backend.name}+{name}",
            eos=backend.eos,
            slots=backend.engine.cache.slots,
            capacity=backend.engine.cache.capacity,
            step_tokens=backend.engine.step_tokens,
            weights="float32" if fused is None else fused.weights,
            compile=backend.engine.runner.compiled is not None,
        )
        variant.variant, variant.files = name, files
        variant.engine.filming = backend.engine.filming
        backend.variants[name] = variant
    return backend.variants[name]


def load_adapter(name: str) -> Adapter:
    """Read a shipped adapter, or one from a folder."""
    folder = _found(name)
    config, card = _described(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _no_adapter(folder, error) from error
    unsupported = [key for key in ("use_dora", "fan_in_fan_out", "modules_to_save") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise ModelError(
            f"{folder} holds more than plain LoRA updates of linear layers; train it without such options."
        )
    try:
        return Adapter(folder, _updates(folder, config, tensors), _numbers(card.get("fingerprint")))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise _no_adapter(folder, error) from error


def about(folder: Path) -> str:
    """What an adapter is, in a line: its rank, and the model and the block size that it was trained for, where it says
    so. Raises ModelError if it cannot be read."""
    config, card = _described(folder)
    text = f"LoRA of rank {config.get('r')}"
    if model := config.get("base_model_name_or_path"):
        text += f" for {model}"
    training = card.get("training")
    if isinstance(training, dict) and (block := training.get("block_size")):
        text += f", trained with blocks of {block}"
    return text


def merged(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A model with the adapter's updates added to its weights, sharing all other tensors with `model`.

    Raises ModelError if the adapter was trained for another model.
    """
    if adapter.fingerprint is not None and not _alike(adapter.fingerprint, fingerprint(model)):
        raise _stranger(adapter, model, "its training started from other weights")
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin: PreTrainedModel = copy.deepcopy(model, shared)
    modules = dict(twin.named_modules())
    for name, (down, up, scale) in adapter.updates.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise _stranger(adapter, model, f"the model has no linear layer {name}")
        weight = module.weight.detach()
        if weight.shape != (up.shape[0], down.shape[1]):
            raise _stranger(adapter, model, f"its update of {name} is {up.shape[0]} × {down.shape[1]}")
        update = scale * (up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32))
        module.weight = nn.Parameter((weight.float() + update).to(weight.dtype), requires_grad=False)
    return twin


def fingerprint(model: PreTrainedModel) -> tuple[float, ...]:
    """A few numbers by which a model is known again, in any floating-point precision: entries of its embedding."""
    weight = embeddings(model).detach().flatten()
    at = torch.linspace(0, len(weight) - 1, _FINGERPRINT, dtype=torch.float64).long()
    return tuple(weight[at.to(weight.device)].double().tolist())


def _alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return len(one) == len(other) and math.dist(one, other) <= _LIKENESS * math.hypot(*one)


def _found(name: str) -> Path:
    """The folder of a shipped adapter, or the one that `name` is the path of."""
    folder = shipped_adapters().get(name) or Path(name).expanduser()
    if not os.path.isdir(folder):
        if folder.name == name:
            raise UnknownName("adapter", name, [*shipped_adapters(), "the path of a folder"])
        raise ModelError(f"there is no adapter at {folder}: no such folder.")
    return folder


def _stamp(folder: Path) -> tuple[tuple[int, int], ...]:
    """What changes when an adapter is written anew: when its files were written, and their sizes."""
    found = [file.stat() for name in (WEIGHTS, CONFIG) if (file := folder / name).is_file()]
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in found)


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An adapter's configuration and its card, which is empty where there is none."""
    try:
        return _entries(folder / CONFIG), _entries(folder / CARD) if (folder / CARD).is_file() else {}
    except (OSError, ValueError) as error:
        raise _no_adapter(folder, error) from error


def _entries(file: Path) -> dict[str, Any]:
    entries = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return entries


def _no_adapter(folder: Path, error: Exception) -> ModelError:
    why = f"{error} is missing" if isinstance(error, KeyError) else error
    return ModelError(f"{folder} is not a LoRA adapter as peft saves it: {why}.")


def _stranger(adapter: Adapter, model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"the adapter {adapter.folder.name} is for another model than this {model.config.model_type} model: {why}; "
        "use the model that it was trained for, or train one with experiments/train_jacobi.py."
    )


def _updates(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"(?:{re.escape(_PREFIX)})?(.+)\.lora_(A|B)\.weight", key)
        if match is None:
            raise ModelError(f"{folder} holds {key}, which is not a LoRA update of a linear layer.")
        halves.setdefault(match[1], {})[match[2]] = tensor
    updates = {}
    for name, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise ModelError(f"{folder} lacks half of the update of {name}.")
        if pair["A"].dim() != 2 or pair["B"].dim() != 2 or len(pair["A"]) != pair["B"].shape[1]:
            raise ModelError(f"{folder} holds two halves of the update of {name} that do not fit each other.")
        rank = len(pair["A"])
        alpha = _patterned(config.get("alpha_pattern"), name, float(config["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[name] = pair["A"], pair["B"], scale
    return updates


def _patterned(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """peft's exceptions by module name: a pattern matches the whole name or its last parts."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
            return float(value)
    return default


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)
