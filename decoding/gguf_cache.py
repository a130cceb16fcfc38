"""GGUF files, converted once to Hugging Face folders in the user's cache.

De-quantising a GGUF takes most of a minute; reading the result back takes a second. A conversion is
stored under a hash of the file's content, so moving or re-installing the file does not repeat it. It is
float32: every block of a quantised GGUF is represented exactly, at the price of four bytes a weight.

Layout of the cache folder:

    <key>/           a finished conversion: config, tokenizer, chat template, model.safetensors
    <key>.partial/   one under way, or the leftover of a process that was killed
    <key>.lock       held (by the operating system, so a killed process lets go) while it is under way
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import mmap
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from filelock import FileLock, Timeout

from decoding.checkpoint import first_line, quiet_transformers, read_model
from decoding.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Scalar = int | float | bool | str

# Part of the path: raise it when a conversion would come out differently.
_LAYOUT = "gguf-1"

# llama.cpp's names of byte-level vocabularies whose merges were learned with every digit on its own.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}


def cache_root() -> Path:
    """Where conversions are kept: $PARALLEL_DECODING_CACHE, or parallel-decoding in the user's cache folder."""
    if own := os.environ.get("PARALLEL_DECODING_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "parallel-decoding"


def converted(parts: Sequence[Path]) -> Path:
    """The Hugging Face folder for a GGUF, converting it first if nobody has.

    `parts` are the files whose concatenation is the GGUF; usually one. Any number of processes may ask
    at once: one converts, the others wait for it. Raises `ModelError` if the file is damaged or of a kind
    that transformers cannot read, or if the cache cannot be written.
    """
    root = cache_root() / _LAYOUT
    try:
        key = content_key(parts)
    except OSError as error:
        raise ModelError(f"cannot read the model file: {error}.") from error
    folder = root / key
    if folder.is_dir():
        return folder
    metadata = read_metadata(parts[0])
    try:
        logger.warning("Converting %s to safetensors once, in %s (this can take a minute).", parts[0].name, root)
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            if not folder.is_dir():
                _clear_leftovers(root)
                partial = root / f"{key}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    with _whole(parts, partial) as gguf:
                        _convert(gguf, metadata, partial)
                    _flush(partial.iterdir())
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"cannot convert {parts[0].name} in the cache {root}: {error}; "
            "make room there or set PARALLEL_DECODING_CACHE to another folder."
        ) from error
    return folder


def content_key(parts: Iterable[Path]) -> str:
    """A hash of the files' concatenated content, 32 hex digits; 1 GB/s or more where the processor helps."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def read_metadata(path: Path) -> dict[str, Scalar]:
    """The single-valued entries of a GGUF's header; arrays (the vocabulary) are skipped.

    Raises `ModelError` if the file does not start with a whole GGUF header.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return dict(_entries(data))
    except (struct.error, LookupError) as error:
        raise ModelError(f"{path} is a damaged GGUF file: its header is incomplete or unreadable.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not a GGUF file, or is damaged: {error}.") from error


# GGUF's numbers for value types; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


def _entries(data: mmap.mmap) -> Iterator[tuple[str, Scalar]]:
    position = 0

    def number(code: str) -> int | float | bool:
        nonlocal position
        (value,) = struct.unpack_from(f"<{code}", data, position)
        position += struct.calcsize(f"<{code}")
        return cast(int, value)

    def text() -> str:
        nonlocal position
        end = position + 8 + int(number("Q"))
        if end > len(data):
            raise ValueError("it ends in the middle of its header")
        value = data[position:end].decode("utf-8", errors="replace")
        position = end
        return value

    def value(kind: int) -> Scalar | None:
        nonlocal position
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return number(_NUMBERS[kind])
        element, length = int(number("I")), int(number("Q"))
        if element in _NUMBERS:
            position += length * struct.calcsize(f"<{_NUMBERS[element]}")
        else:
            for _ in range(length):
                value(element)
        return None

    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with the letters GGUF")
    position = 8
    _tensors, entries = number("Q"), int(number("Q"))
    for _ in range(entries):
        key = text()
        if (entry := value(int(number("I")))) is not None:
            yield key, entry


def _clear_leftovers(root: Path) -> None:
    """Delete what killed conversions left behind; those still under way hold their lock."""
    for partial in root.glob("*.partial"):
        try:
            with FileLock(partial.with_suffix(".lock"), timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            pass


@contextlib.contextmanager
def _whole(parts: Sequence[Path], folder: Path) -> Iterator[Path]:
    """The GGUF as one file, put together in `folder` for as long as it is needed."""
    if len(parts) == 1:
        yield parts[0].resolve()
        return
    whole = folder / "whole.gguf"
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 22)
    yield whole
    whole.unlink()


def _flush(files: Iterable[Path]) -> None:
    """Have the files on disk before the rename, so that a power cut cannot leave a finished folder of empty files."""
    for file in files:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def _convert(gguf: Path, metadata: dict[str, Scalar], folder: Path) -> None:
    """Write the model and tokenizer of `gguf` to `folder` in Hugging Face's layout."""
    import torch
    from transformers import AutoTokenizer, GgufConfig

    source, file = str(gguf.parent), gguf.name
    try:
        # transformers draws one progress bar here that no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            exactly = GgufConfig(dequantize=True)
            model = read_model(source, gguf_file=file, dtype=torch.float32, quantization_config=exactly)
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    except ModelError:
        raise
    except Exception as error:  # a damaged or unsupported file surfaces as almost any type
        raise ModelError(f"cannot convert {gguf}, which may be damaged: {first_line(error)}") from error
    _correct_tokenizer(tokenizer, metadata)
    # A chat model ends its turn with a token of its own, which GGUF keeps apart from the end of text.
    ends = {metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")} - {None}
    if ends and model.generation_config is not None:
        model.generation_config.eos_token_id = sorted(cast("set[int]", ends))
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _correct_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Scalar]) -> None:
    """Put right what transformers' conversion drops, differently in every version.

    The file's special tokens win; nothing is "cleaned up" when decoding, so that text is what the tokens
    say; digits are split one by one where the vocabulary was learned so.
    """
    from tokenizers import pre_tokenizers

    for token, entry in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = metadata.get(f"tokenizer.ggml.{entry}_token_id")
        if number is not None:
            setattr(tokenizer, f"{token}_token", tokenizer.convert_ids_to_tokens(int(number)))
    tokenizer.clean_up_tokenization_spaces = False
    if metadata.get("tokenizer.ggml.pre") in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
