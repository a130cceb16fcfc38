"""EAGLE-3 heads on disk: read in the layouts of SafeAILab and of the `speculators` library, written in the latter.

Both keep a config.json beside the weights. SafeAILab's describes the decoder layer alone, calls it `midlayer` and
takes the usual three layers of the target for granted; the `speculators` library (whose layout vLLM serves) nests the
layer's configuration, calls it `layers.0`, and names the target and the layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from decoding.errors import ModelError
from drafters.heads.eagle import Eagle3Head, HeadConfig, default_layers

_LAYERS: Mapping[str, type[LlamaConfig] | type[Qwen3Config]] = {"llama": LlamaConfig, "qwen3": Qwen3Config}
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_LIBRARY_VERSION = "0.9.0"  # of the `speculators` library, whose layout is written


def read_head(folder: str | Path, target_layers: int) -> Eagle3Head:
    """A head in either layout, in float32, on the CPU.

    target_layers: how many decoder layers the target has; heads that do not say so see the usual three of them.

    Raises ModelError for a folder that holds no EAGLE-3 head, a damaged file, or weights that do not fit the
    configuration.
    """
    folder = Path(folder).expanduser()
    values = read_config(folder)
    weights = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in read_weights(folder).items()}
    try:
        if values.get("speculators_model_type") == "eagle3":
            config = _speculators_config(values, weights, target_layers)
        elif "speculators_model_type" in values:
            raise ModelError(f"{folder} holds a {values['speculators_model_type']!r} head, not an EAGLE-3 one.")
        else:
            config = _safeailab_config(values, weights, target_layers)
        head = Eagle3Head(config)
        own = head.state_dict()
        maps = {"d2t", "t2d"} if config.draft_vocab == config.vocab else set()
        missing = sorted(own.keys() - weights.keys() - maps)
        surplus = sorted(weights.keys() - own.keys() - {"verifier_lm_head.weight", "verifier_norm.weight"})
        misshapen = sorted(n for n, tensor in weights.items() if n in own and own[n].shape != tensor.shape)
        if missing or surplus or misshapen:
            what = missing[:1] or misshapen[:1] or surplus[:1]
            raise ModelError(
                f"the EAGLE-3 head in {folder} does not fit its configuration: {what[0]} is "
                + ("missing." if missing else "misshapen." if misshapen else "not part of it.")
            )
        head.load_state_dict({n: tensor for n, tensor in weights.items() if n in own}, strict=False)
        stray = [layer for layer in config.layers if not 1 <= layer <= target_layers]
        if stray:
            raise ModelError(
                f"the EAGLE-3 head in {folder} looks at what enters layer {stray[0]}, and the model has "
                f"{target_layers} layers; use a head that was trained for it."
            )
        if not 0 <= int(head.tokens.min()) <= int(head.tokens.max()) < config.vocab:
            raise ModelError(f"the EAGLE-3 head in {folder} guesses tokens outside its vocabulary; fetch it again.")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} holds no EAGLE-3 head that can be read: {error!r}.") from error
    return head.requires_grad_(False).eval()


def write_head(
    head: Eagle3Head, folder: str | Path, *, verifier: str | None = None, dtype: torch.dtype = torch.float16
) -> None:
    """Write a head in the layout of the `speculators` library.

    verifier: the target as that library and vLLM shall find it, a hub id or folder: they take embeddings from there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = head.config
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in head.state_dict().items()
    }
    if config.draft_vocab == config.vocab:
        del weights["d2t"], weights["t2d"]
    proposal = {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    values: dict[str, Any] = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": _LIBRARY_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
        "transformer_layer_config": config.layer.to_diff_dict(),
        "draft_vocab_size": config.draft_vocab,
        "target_hidden_size": config.target_hidden if config.target_hidden != config.hidden else None,
        "eagle_aux_hidden_state_layer_ids": list(config.layers),
        "embed_requires_grad": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Not part of the layout, and ignored by others: which target the head was made for.
        "target_num_hidden_layers": config.target_layers,
        "target_model": config.target_model,
        **{flag: getattr(config, flag) for flag in _FLAGS},
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    part = folder / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a head. Raises ModelError if there is none or it is damaged."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} holds no trained head: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{folder / 'config.json'} describes no head.")
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a head.

    Raises ModelError if there are none, if they are pickled (which can run code), or if a file is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if any(folder.glob("*.bin")):
            raise ModelError(
                f"the weights in {folder} are pickled, and such files can run code; save them as safetensors "
                "(safetensors.torch.save_file) and try again."
            )
        raise ModelError(f"{folder} holds no weights (.safetensors files).")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"{file} is damaged or cut short ({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
                "fetch or write it again."
            ) from error
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"{name} in {folder} holds infinities or NaN, so the head is damaged; fetch it again.")
    return weights


def _speculators_config(values: dict[str, Any], weights: dict[str, Tensor], target_layers: int) -> HeadConfig:
    layer = dict(values["transformer_layer_config"])
    kind = layer.pop("model_type", "qwen3")
    if kind not in _LAYERS:
        raise ModelError(f"an EAGLE-3 head with a {kind} layer cannot be run; llama and qwen3 can.")
    verifier = values.get("speculators_config", {}).get("verifier", {}).get("name_or_path")
    own = values.get("target_num_hidden_layers")
    return _config(
        _LAYERS[kind](**layer),
        weights,
        values.get("eagle_aux_hidden_state_layer_ids") or default_layers(own or target_layers),
        draft_vocab=int(values["draft_vocab_size"]),
        target_layers=own,
        target_model=values.get("target_model") or verifier or "",
        **{flag: bool(values.get(flag, False)) for flag in _FLAGS},
    )


def _safeailab_config(values: dict[str, Any], weights: dict[str, Tensor], target_layers: int) -> HeadConfig:
    if "fc.weight" not in weights or "layers.0.hidden_norm.weight" not in weights:
        raise ModelError("these weights are not those of an EAGLE-3 head (fc and midlayer are missing).")
    known = {
        name: value for name, value in values.items() if name not in ("architectures", "model_type", "torch_dtype")
    }
    if "t2d" in weights:
        known["vocab_size"] = len(weights["t2d"])
    layers = (values.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    return _config(
        LlamaConfig(**known),
        weights,
        layers or default_layers(target_layers),
        draft_vocab=int(values.get("draft_vocab_size") or known["vocab_size"]),
    )


def _config(
    layer: LlamaConfig | Qwen3Config, weights: dict[str, Tensor], layers: Any, *, draft_vocab: int, **more: Any
) -> HeadConfig:
    if layer.num_hidden_layers != 1 and any(name.startswith("layers.1.") for name in weights):
        raise ModelError("an EAGLE-3 head of more than one decoder layer cannot be run.")
    layer.num_hidden_layers = 1
    width, left_over = divmod(weights["fc.weight"].shape[1], len(layers))
    if left_over:
        raise ModelError(
            f"fc.weight has {weights['fc.weight'].shape[1]} columns, which {len(layers)} layers cannot fill."
        )
    return HeadConfig(
        layer,
        draft_vocab=draft_vocab,
        target_hidden=width,
        layers=tuple(int(i) for i in layers),
        own_embeddings="embed_tokens.weight" in weights,
        **more,
    )
