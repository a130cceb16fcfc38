"""The compiled step: the model's numbers, and the same bits whatever else is in the step."""

from __future__ import annotations

import io
import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from decoding.backends.local import LocalBackend
from decoding.calibrate import calibrate
from decoding.engine import fused
from decoding.engine.block import Block
from decoding.engine.cache import LINE
from decoding.engine.latency import LatencyModel, latency_of, measure
from decoding.engine.packing import Row
from decoding.engine.precision import GROUP, int4_groups, int8_rows
from decoding.engine.runner import Runner, embeddings
from decoding.errors import ModelError
from tests.tiny import tiny_model, tiny_tokenizer

needs_compiler = pytest.mark.skipif(fused.find_compiler() is None, reason="there is no C++ compiler here")
pytestmark = needs_compiler

PROMPT = [7, 30, 101, 8, 55, 31, 2]
CHAIN = [9, 77, 140, 12]


def layers_only(monkeypatch: pytest.MonkeyPatch, model: Any, **options: Any) -> Runner:
    with monkeypatch.context() as patch:
        patch.setenv("PARALLEL_DECODING_FUSED", "0")
        runner = Runner(model, **options)
    assert runner.fused is None
    return runner


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_it_computes_what_the_layers_compute(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide: dict[str, Any] = {"sliding_window": None} if kind == "mistral" else {}
    model = tiny_model(kind, **wide)
    ours, theirs = Runner(model, slots=4, capacity=64), layers_only(monkeypatch, model, slots=4, capacity=64)
    assert ours.fused is not None
    rows = [
        Row(3, PROMPT, Block()),
        Row(0, [4, 5], Block([6, 7, 8, 9], [-1, 0, -1, 2])),
        Row(1, [4, 5], Block([6, 7, 8], bidirectional=True)),
        Row(2, PROMPT, Block(), logits=False),
    ]
    for runner in (ours, theirs):
        runner.capture = (0, 2)
    a, b = ours.forward(rows), theirs.forward(rows)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours.captured, theirs.captured, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(ours.forward(rows, layers=2), theirs.forward(rows, layers=2), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_a_token_has_the_same_bits_in_any_step(weights: str) -> None:
    runner = Runner(tiny_model("llama", hidden_size=96, intermediate_size=544), slots=8, capacity=64, weights=weights)
    assert runner.fused is not None
    one_by_one = []
    for token in PROMPT + CHAIN:
        one_by_one.append(runner.forward([Row(5, [token], Block())])[0])
        runner.cache.commit(5, [token])
    expected = torch.stack(one_by_one[len(PROMPT) - 1 :])
    at_once = runner.forward([Row(0, PROMPT, Block(CHAIN))])
    assert torch.equal(at_once, expected)
    # in a tree whose other branches come first, beside other sequences
    tree = Block([50, CHAIN[0], 51, CHAIN[1], 52, CHAIN[2], CHAIN[3]], [-1, -1, 1, 1, 0, 3, 5])
    others = [Row(slot, [slot, 9, 4, 77][: slot + 1], Block()) for slot in (1, 2, 3)]
    logits = runner.forward([others[0], Row(0, PROMPT, tree), *others[1:]])[1:]
    assert torch.equal(logits[[0, 2, 4, 6, 7]], expected)
    # and a token that sees another one has other bits
    assert not torch.equal(runner.forward([Row(0, [8, *PROMPT[1:]], Block(CHAIN))])[1], expected[1])


@pytest.mark.parametrize("size", [20, 64, 128])
def test_long_texts_have_the_same_bits_read_at_once_or_bit_by_bit(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", head_dim=size)
    runner, theirs = Runner(model, slots=2, capacity=256), layers_only(monkeypatch, model, slots=2, capacity=256)
    text = [i * 37 % 250 for i in range(203)]
    whole = runner.forward([Row(0, text[:1], Block(text[1:]))])
    torch.testing.assert_close(whole, theirs.forward([Row(0, text[:1], Block(text[1:]))]), rtol=1e-4, atol=5e-5)
    at = 0
    for count in (1, 2, 3, 4, 5, 6, 7, 61, 90, 24):
        part = runner.forward([Row(1, text[at : at + 1], Block(text[at + 1 : at + count]))])
        assert torch.equal(part, whole[at : at + count])
        runner.cache.commit(1, text[at : at + count])
        at += count
    assert at == len(text)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_favoured_tokens_are_those_of_steps_one_by_one(weights: str) -> None:
    runner = Runner(tiny_model("llama", hidden_size=96, intermediate_size=544), slots=4, capacity=64)
    runner.hold(weights)
    runner.forward([Row(2, PROMPT, Block())])
    runner.cache.commit(2, PROMPT)
    rows = [Row(2, [9], Block()), Row(0, PROMPT, Block()), Row(1, [4, 5], Block())]
    tokens, leads = runner.favoured(rows, 6, weights)
    assert tokens.shape == leads.shape == (6, 3) and list(runner.cache.lengths) == [0, 0, len(PROMPT), 0]
    for level in range(6):
        logits = runner.forward(rows, weights=weights)
        best = logits.topk(2)
        assert best.indices[:, 0].tolist() == tokens[level].tolist()
        assert torch.equal(best.values[:, 0] - best.values[:, 1], torch.from_numpy(leads[level]))
        for row in rows:
            runner.cache.commit(row.slot, row.pending)
        rows = [Row(row.slot, [token], Block()) for row, token in zip(rows, tokens[level].tolist(), strict=True)]
    runner.cache.values[0][:] = float("nan")
    tokens, leads = runner.favoured(rows, 2, weights)  # whatever it says, it names tokens
    assert ((tokens >= 0) & (tokens < runner.vocab)).all()


def test_the_number_of_threads_changes_no_bit() -> None:
    runner = Runner(tiny_model("llama", hidden_size=96, intermediate_size=272), slots=2, capacity=64)
    rows = [Row(0, PROMPT, Block(CHAIN)), Row(1, [3], Block([4, 5, 6]))]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = runner.forward(rows)
        torch.set_num_threads(3)
        assert torch.equal(runner.forward(rows), alone)
    finally:
        torch.set_num_threads(before)


def test_weights_and_caches_begin_with_a_cache_line() -> None:
    model = tiny_model("llama")
    for parameter in model.parameters():  # as in a file whose header has an odd length
        moved = torch.empty(parameter.numel() + 26)[10:][: parameter.numel()].view_as(parameter)
        parameter.data = moved.copy_(parameter)
    assert all(parameter.data_ptr() % LINE for parameter in model.parameters())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    runner = Runner(model, slots=2, capacity=32)
    assert all(parameter.data_ptr() % LINE == 0 for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(tensor.data_ptr() % LINE == 0 for tensor in (runner.cache.keys[0], runner.cache.values[0]))
    assert runner.fused is not None


def test_sizes_that_fill_no_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 44, "head_dim": 10, "intermediate_size": 37, "vocab_size": 263}
    model = tiny_model("llama", **shape)
    ours, theirs = Runner(model, slots=2, capacity=32), layers_only(monkeypatch, model, slots=2, capacity=32)
    rows = [Row(1, PROMPT, Block(CHAIN))]
    torch.testing.assert_close(ours.forward(rows), theirs.forward(rows), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("weights", "levels"), [("int8", 254), ("int4", 15)])
def test_fewer_bits_are_the_model_with_rounded_weights(
    weights: str, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=352)  # 11 groups: one array of 8 and a part of one
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    rows = [Row(0, PROMPT, Block(CHAIN))]
    unrounded = layers_only(monkeypatch, model, slots=2, capacity=64).forward(rows)
    runner = Runner(model, slots=2, capacity=64, weights=weights)
    assert runner.fused is not None and runner.fused.weights == weights
    after = model.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(before, after)
    assert ((before - after).abs() <= before.abs().amax(dim=1, keepdim=True) / levels * 1.001).all()
    theirs = layers_only(monkeypatch, model, slots=2, capacity=64).forward(rows)
    assert (runner.forward(rows) - theirs).abs().max() < 0.01  # inputs in 16 bits
    assert (runner.forward(rows) - unrounded).abs().max() > 0.1


def test_four_bits_hold_what_was_made_of_four_bits() -> None:
    scale, minimum = torch.rand(6, 3).half(), -torch.rand(6, 3).half()
    whole = torch.randint(0, 16, (6, 3, GROUP))
    whole[..., 0], whole[..., 1] = 0, 15
    weight = (whole * scale.float()[..., None] + minimum.float()[..., None]).flatten(1)
    found = int4_groups(weight)
    assert torch.equal(found[0], whole.to(torch.uint8))
    assert torch.equal(found[1], scale) and torch.equal(found[2], minimum)


def test_columns_that_make_no_groups_stay_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=40)
    rows = [Row(0, PROMPT, Block(CHAIN))]
    found = Runner(model, slots=2, capacity=64, weights="int4").forward(rows)
    theirs = layers_only(monkeypatch, model, slots=2, capacity=64).forward(rows)
    assert (found - theirs).abs().max() < 0.01


def test_rounding_twice_changes_nothing() -> None:
    weight = torch.randn(16, 40)
    whole, factor = int8_rows(weight)
    again, same = int8_rows(whole * factor[:, None])
    assert torch.equal(whole, again)
    torch.testing.assert_close(factor, same)


def test_what_is_not_a_number_stays_so() -> None:
    runner = Runner(tiny_model("llama"), slots=2, capacity=32)
    runner.cache.keys[1][0, :, :4] = float("nan")
    runner.cache.lengths[0] = 4
    assert runner.forward([Row(0, [5], Block())]).isnan().any()
    assert runner.forward([Row(1, [5], Block())]).isfinite().all()


@pytest.mark.parametrize("kind", ["gemma3", "qwen3-moe", "gpt2", "mistral"])
def test_models_of_another_shape_run_their_own_layers(kind: str) -> None:
    assert Runner(tiny_model(kind), slots=2, capacity=32).fused is None  # this Mistral's window is 8 tokens


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fused.compiled.cache_clear()
    yield
    monkeypatch.undo()
    fused.compiled.cache_clear()


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler-anywhere"])
@pytest.mark.usefixtures("fresh_compiler")
def test_without_a_compiler_the_layers_run_and_it_is_said_once(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            runner = Runner(tiny_model("llama"), slots=2, capacity=32)
    assert runner.fused is None
    assert len([record for record in caplog.records if "uncompiled" in record.message]) == 1


@pytest.mark.parametrize("compiler", ["clang++", f"{sys.executable} -m ziglang c++"])
@pytest.mark.usefixtures("fresh_compiler")
def test_other_compilers_build_it_as_well(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (find_spec("ziglang") if "ziglang" in compiler else shutil.which(compiler)):
        pytest.skip("it is not installed")
    model = tiny_model("llama")
    rows = [Row(0, PROMPT, Block(CHAIN))]
    expected = layers_only(monkeypatch, model, slots=2, capacity=64).forward(rows)
    monkeypatch.setenv("CXX", compiler)
    runner = Runner(model, slots=2, capacity=64)
    assert runner.fused is not None
    torch.testing.assert_close(runner.forward(rows), expected, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def latency() -> LatencyModel:
    return measure(Runner(tiny_model("llama"), slots=8, capacity=128))


def test_a_latency_model_is_measured_and_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLEL_DECODING_CACHE", str(tmp_path))
    runner = Runner(tiny_model("llama"), slots=8, capacity=128)
    model = latency_of(runner)
    assert latency_of(runner) == model  # read, not measured again
    assert runner.cache.free == 8 and not runner.cache.lengths.any()
    (file,) = tmp_path.glob("latency-*/*.json")
    file.write_text("{")
    assert latency_of(runner).curve[0][0] == 1  # a damaged file is no obstacle


def test_costs_are_not_measured_while_every_slot_is_busy() -> None:
    runner = Runner(tiny_model("llama"), slots=1, capacity=128)
    slot, _ = runner.cache.acquire([1, 2])
    with pytest.raises(ModelError, match="needs a free slot"):
        measure(runner)
    runner.cache.release(slot)
    assert measure(runner).cost(1, 1, 0) > 0


def test_costs_broadcast_and_never_fall_with_the_tokens(latency: LatencyModel) -> None:
    costs = latency.cost(np.arange(1, 200), 1, 16)
    assert costs.shape == (199,) and (np.diff(costs) >= 0).all() and (costs > 0).all()
    assert isinstance(latency.cost(3, 1, 10), float)
    assert latency.cost(np.array([[1], [9]]), np.array([1, 2, 3]), 0).shape == (2, 3)


def test_the_error_is_that_of_steps_that_were_not_fitted(latency: LatencyModel) -> None:
    assert latency.held_out and latency.error >= 0
    twice = replace(
        latency,
        held_out=tuple(
            replace(m, seconds=2 * latency.cost(m.tokens, m.sequences, m.context)) for m in latency.held_out
        ),
    )
    assert twice.error == pytest.approx(0.5)


def test_calibration_shows_costs_beside_their_floors(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLEL_DECODING_CACHE", str(tmp_path))
    monkeypatch.setattr("decoding.calibrate._BYTES", 2**20)
    monkeypatch.setattr("decoding.calibrate._SIDE", 64)
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=4, capacity=128)
    result = calibrate(backend)
    assert backend.latency is result.latency  # and widths follow from it
    assert result.work > embeddings(backend.model).numel()
    assert result.weights == 4 * result.work and result.computing(2) == 2 * result.computing(1) > 0
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result.table())
    assert "Predictions of" in console.export_text()
    result.plot(tmp_path / "cost.svg")
    assert "operations ÷ peak" in (tmp_path / "cost.svg").read_text()


def test_prompts_are_read_in_steps_no_wider_than_pays() -> None:
    dear = LatencyModel(
        "device", ((1, 1.0), (32, 1.0), (64, 2.0)), 0.0, 0.0
    )  # from 32 tokens on a token costs the same
    cheap = LatencyModel("device", ((1, 1.0), (32, 1.0), (64, 1.0)), 0.0, 0.0)  # a token more costs nothing
    assert dear.step_tokens() == 64
    assert cheap.step_tokens() == 512
