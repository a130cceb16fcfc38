"""A whole step of a Llama-shaped model in one compiled call, on a CPU.

A step over a few tokens has little to compute and a few hundred operations to call; matrix libraries, tuned for many
rows, read the weights at a third of the memory's speed. `fused.cpp` runs all layers in one call, and computes every
token by the same operations in the same order whatever else is in the step: logits are the same bits alone, in a batch,
in a tree and in a chain.

It needs a C++ compiler (`$CXX`, c++, g++, clang++, or the package `ziglang`), is compiled once and kept in the user's
cache. Without one, and for models of another shape, the tensor library's own layers run.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from decoding.engine.cache import LINE, KVCache
from decoding.engine.packing import Places
from decoding.engine.precision import int4_groups, int8_rows, kept_as

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("fused.cpp")
_HEADERS = tuple(_SOURCE.with_name(name) for name in ("fused_products.h", "fused_vectors.h"))
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=off")
_SHAPES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""transformers' classes whose layers are the ones of `fused.cpp`."""

_BLOCK = 8  # rows of four bits that are multiplied together
_COMPILE_SECONDS = 300


class Matrix(ctypes.Structure):
    """A weight of `fused.cpp`; see there. The same goes for the other structures."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "attention_norm", "query_norm", "key_norm")),
        *((name, Matrix) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


class Shape(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("hidden", "heads", "key_heads", "head_size", "intermediate", "capacity", "vocabulary")
        ),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "norm")),
        ("head", Matrix),
    )


class Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "layers", "kept", "captures")),
        *((name, ctypes.c_void_p) for name in ("hidden", "slot", "place", "position", "prefix", "first", "more")),
        *((name, ctypes.c_void_p) for name in ("keep", "logits", "capture", "captured")),
        *((name, ctypes.c_int64) for name in ("threads", "levels")),
        *((name, ctypes.c_void_p) for name in ("embedding", "favoured", "lead")),
    )


class FusedModel:
    """The compiled step of one model over one cache.

    weights: "float32"; or "int8" for 8-bit integers with a factor for every row; or "int4" for four bits with a scale
    and a minimum for every group, and a head in 8. So the step reads them;
    the inputs of a product become 16-bit integers with a factor for every token, so that a token's result does not
    depend on its neighbours, and their products are summed exactly.
    """

    def __init__(self, library: ctypes.CDLL, model: PreTrainedModel, cache: KVCache, weights: str) -> None:
        self.build = Path(library._name).stem  # names the source and the compiler
        self._run = library.run_step
        self._run.restype = None
        self._run.argtypes = [ctypes.POINTER(Shape), ctypes.c_void_p, ctypes.POINTER(Step)]
        self._owned: list[torch.Tensor] = []  # what the structures point to
        self.weights = weights
        if weights == "float32":  # the model reads the copies, too, and lets go of the file
            for parameter in model.parameters():
                if parameter.data_ptr() % LINE:
                    parameter.data = parameter.data.clone()
        inner: Any = model.base_model
        config = model.config.get_text_config()
        self._embedding: torch.Tensor = inner.embed_tokens.weight
        self._hidden = int(config.hidden_size)
        head: Any = model.get_output_embeddings()
        self.vocab = int(head.weight.shape[0])
        attention = inner.layers[0].self_attn
        size = int(attention.head_dim)
        at = torch.arange(cache.capacity)[None]
        cosine, sine = inner.rotary_emb(torch.zeros(1, dtype=torch.float32), at)
        self._shape = Shape(
            hidden=self._hidden,
            heads=int(config.num_attention_heads),
            key_heads=int(config.num_key_value_heads),
            head_size=size,
            intermediate=int(config.intermediate_size),
            capacity=cache.capacity,
            vocabulary=self.vocab,
            epsilon=float(config.rms_norm_eps),
            scale=float(attention.scaling),
            cosine=self._pointer(cosine[0, :, : size // 2]),
            sine=self._pointer(sine[0, :, : size // 2]),
            norm=self._pointer(inner.norm.weight),
            head=self._matrix(head, head=True),
        )
        self._layers = (Layer * len(inner.layers))()
        for i, layer in enumerate(inner.layers):
            attention, mlp = layer.self_attn, layer.mlp
            self._layers[i] = Layer(
                input_norm=self._pointer(layer.input_layernorm.weight),
                attention_norm=self._pointer(layer.post_attention_layernorm.weight),
                query_norm=self._pointer(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
                key_norm=self._pointer(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
                query=self._matrix(attention.q_proj),
                key=self._matrix(attention.k_proj),
                value=self._matrix(attention.v_proj),
                output=self._matrix(attention.o_proj),
                gate=self._matrix(mlp.gate_proj),
                up=self._matrix(mlp.up_proj),
                down=self._matrix(mlp.down_proj),
                keys=cache.keys[i].data_ptr(),
                values=cache.values[i].data_ptr(),
            )
        self._owned += [*cache.keys, *cache.values]

    def _pointer(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._owned.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, layer: Any, *, head: bool = False) -> Matrix:
        weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
        scale = None
        rows, columns = weight.shape
        kind = kept_as(self.weights, columns, head=head)
        if kind == "int8":
            weight, factor = int8_rows(weight)
            scale = self._pointer(factor)
        elif kind == "int4":
            weight = _blocks(*int4_groups(weight))
        pointer = self._pointer(weight)
        bits = {"float32": 32, "int8": 8, "int4": 4}[kind]
        return Matrix(pointer, scale, None if bias is None else self._pointer(bias), rows, columns, bits)

    def forward(
        self, tokens: np.ndarray, places: Places, keep: np.ndarray, layers: int, capture: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [kept, vocab] and the outputs [tokens, captured layers, hidden] of the layers in `capture`."""
        logits = torch.empty(len(keep), self.vocab)
        captured = torch.empty(len(tokens), len(capture), self._hidden)
        wanted = np.asarray(capture, dtype=np.int32)
        self._step(
            tokens, places, keep, logits,
            layers=layers, captures=len(capture), capture=wanted.ctypes.data, captured=captured.data_ptr(),
        )  # fmt: skip
        return logits, captured

    def favoured(
        self, tokens: np.ndarray, places: Places, keep: np.ndarray, levels: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What follows the tokens in `keep`, each the last of a row of pending ones, if the most likely token is taken
        so many times: the tokens [levels, kept], and by how much their logits exceed the next best [levels, kept].
        Overwrites `places`."""
        best, lead = np.empty((levels, len(keep)), dtype=np.int32), np.empty((levels, len(keep)), dtype=np.float32)
        self._step(
            tokens, places, keep, torch.empty(len(keep), self.vocab),
            layers=len(self._layers), levels=levels, embedding=self._embedding.data_ptr(),
            favoured=best.ctypes.data, lead=lead.ctypes.data,
        )  # fmt: skip
        return best, lead

    def _step(self, tokens: np.ndarray, places: Places, keep: np.ndarray, logits: torch.Tensor, **more: int) -> None:
        hidden = self._embedding[torch.from_numpy(tokens)]
        kept = keep.astype(np.int32)
        step = Step(
            tokens=len(tokens),
            kept=len(keep),
            hidden=hidden.data_ptr(),
            slot=places.slot.ctypes.data,
            place=places.place.ctypes.data,
            position=places.position.ctypes.data,
            prefix=places.prefix.ctypes.data,
            first=places.first.ctypes.data,
            more=places.more.ctypes.data,
            keep=kept.ctypes.data,
            logits=logits.data_ptr(),
            threads=torch.get_num_threads(),
            **more,
        )
        self._run(ctypes.byref(self._shape), self._layers, ctypes.byref(step))


def _blocks(whole: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """[bytes] weights of four bits, from `int4_groups`, in the order that `fused.cpp` wants."""
    pad = -len(whole) % _BLOCK
    whole, scale, minimum = (F.pad(x, (0,) * (2 * x.dim() - 1) + (pad,)) for x in (whole, scale, minimum))
    # [blocks, rows, groups, eights of columns, halves of these, columns]
    parts = whole.unflatten(0, (-1, _BLOCK)).unflatten(-1, (-1, 2, 4))
    packed = (parts[..., 0, :] | parts[..., 1, :] << 4).permute(0, 2, 3, 1, 4).flatten(2)
    numbers = (x.unflatten(0, (-1, _BLOCK)).mT.contiguous().view(torch.uint8) for x in (scale, minimum))
    return torch.cat([packed, *numbers], dim=-1).flatten()


def fits(model: PreTrainedModel, cache: KVCache) -> bool:
    """Whether `fused.cpp` can run this model: its class, and nothing that its layers could do differently."""
    inner: Any = model.base_model
    config = model.config.get_text_config()
    if type(inner).__name__ not in _SHAPES or getattr(config, "hidden_act", "") != "silu":
        return False
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return False
    modules: list[Any] = list(model.modules())
    matrices = [m for m in modules if isinstance(getattr(m, "weight", None), torch.Tensor) and m.weight.dim() == 2]
    if any(type(m) not in (nn.Linear, nn.Embedding) for m in matrices):
        return False
    window = getattr(config, "sliding_window", None)
    if window is not None and window < cache.capacity:
        return False
    rotary: Any = inner.rotary_emb
    if "dynamic" in str(getattr(rotary, "rope_type", "default")) or getattr(rotary, "rope_type", "") == "longrope":
        return False
    size = inner.layers[0].self_attn.head_dim
    return bool(rotary.inv_freq.shape[0] * 2 == size)


def fuse(model: PreTrainedModel, cache: KVCache, weights: str = "float32") -> FusedModel | None:
    """The compiled step for this model, or None where there is no compiler or the model has another shape."""
    if os.environ.get("PARALLEL_DECODING_FUSED") == "0" or not fits(model, cache):
        return None
    library = compiled()
    return None if library is None else FusedModel(library, model, cache, weights)


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """`fused.cpp`, compiled for this machine now or earlier; None, and one warning, without a compiler that can."""
    from decoding.gguf_cache import cache_root

    compiler = find_compiler()
    if compiler is None:
        logger.warning("no C++ compiler was found, so steps run uncompiled; install g++ or `pip install ziglang`.")
        return None
    source = b"".join(file.read_bytes() for file in (_SOURCE, *_HEADERS))
    key = hashlib.sha256(source + repr((compiler, _FLAGS, platform.machine(), _processor())).encode()).hexdigest()[:16]
    target = cache_root() / "kernels" / f"fused-{key}.so"
    try:
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                built = Path(folder) / target.name
                _compile(compiler, built)
                built.replace(target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("the compiled step could not be built, so steps run uncompiled: %s", str(detail).strip()[-300:])
        return None


def find_compiler() -> tuple[str, ...] | None:
    """The command that compiles C++ here."""
    if own := os.environ.get("CXX"):
        return tuple(own.split())
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return (path,)
    return (sys.executable, "-m", "ziglang", "c++") if find_spec("ziglang") else None


def _compile(compiler: tuple[str, ...], target: Path) -> None:
    """With threads if the compiler has them; their runtime is the one that the tensor library has loaded already."""
    command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(target)]
    try:
        subprocess.run([*command, "-fopenmp"], check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    except subprocess.CalledProcessError:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)


def _processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
