"""The runner's passes over packed blocks against plain forwards, on tiny random models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.engine.block import Block
from decoding.engine.packing import Row
from decoding.engine.runner import Runner
from decoding.errors import ModelError
from tests.greedy import VOCAB
from tests.masked_reference import logits_of
from tests.tiny import tiny_model


@st.composite
def tree_steps(draw: st.DrawFn) -> list[list[tuple[list[int], list[int], int]]]:
    """For each of up to 3 sequences, up to 4 steps of (tokens, parents, node whose path is kept or -1)."""
    sequences = []
    for _ in range(draw(st.integers(1, 3))):
        steps = []
        for _ in range(draw(st.integers(1, 4))):
            size = draw(st.integers(0, 7))
            tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=size, max_size=size))
            parents = [draw(st.integers(-1, node - 1)) for node in range(size)]
            steps.append((tokens, parents, draw(st.integers(-1, size - 1)) if size else -1))
        sequences.append(steps)
    return sequences


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_random_trees_and_rollbacks_equal_a_plain_forward(kind: str) -> None:
    model = tiny_model(kind)
    runner = Runner(model, slots=4, capacity=64)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(tree_steps())
    def check(sequences: list[list[tuple[list[int], list[int], int]]]) -> None:
        cache = runner.cache
        cache.forget()
        slots = [cache.acquire([7 + i, 3])[0] for i in range(len(sequences))]
        texts = [[7 + i, 3] for i in range(len(sequences))]
        try:
            for turn in range(max(map(len, sequences))):
                active = [i for i, steps in enumerate(sequences) if len(steps) > turn]
                steps = [sequences[i][turn] for i in active]
                rows = [
                    Row(slots[i], texts[i][int(cache.lengths[slots[i]]) :], Block(tokens, parents))
                    for i, (tokens, parents, _) in zip(active, steps, strict=True)
                ]
                logits = runner.forward(rows).split([1 + len(row.block) for row in rows])
                moves = []
                for i, row, (tokens, parents, leaf), said in zip(active, rows, steps, logits, strict=True):
                    for node in range(-1, len(tokens)):
                        path = _path(parents, node)
                        plain = model(torch.tensor([texts[i] + [tokens[n] for n in path]])).logits[0, -1]
                        torch.testing.assert_close(said[1 + node], plain, atol=2e-4, rtol=1e-4)
                    kept = _path(parents, leaf)
                    base = int(cache.lengths[row.slot]) + len(row.pending)
                    moves += [(row.slot, base + n, base + place) for place, n in enumerate(kept) if n != place]
                    cache.commit(row.slot, [*row.pending, *(tokens[n] for n in kept)])
                    texts[i] += [tokens[n] for n in kept] + [11]
                cache.move(moves)
        finally:
            for slot in slots:
                cache.release(slot)

    check()


def _path(parents: list[int], node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def test_bidirectional_blocks_see_all_of_themselves() -> None:
    model = tiny_model("llama")
    runner = Runner(model, slots=2, capacity=32)
    slot, _ = runner.cache.acquire([1, 2, 3])
    one = runner.forward([Row(slot, [1, 2, 3], Block([4, 5, 6], bidirectional=True))])
    other = runner.forward([Row(slot, [1, 2, 3], Block([4, 5, 9], bidirectional=True))])
    assert torch.equal(one[0], other[0]), "committed tokens must not see the block"
    assert not torch.allclose(one[1], other[1]), "the first token of the block must see its last"


@pytest.mark.parametrize("fused", ["0", "1"])
def test_what_lies_behind_a_block_is_seen_by_its_own_stretch_only(fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second pass over the same tokens, with the end of the stretch read from the cache, is exact."""
    monkeypatch.setenv("PARALLEL_DECODING_FUSED", fused)
    model = tiny_model("llama")
    runner = Runner(model, slots=2, capacity=32)
    rows, expected = [], []
    for length, size in ((16, 4), (10, 2)):  # a block that opens a stretch, and one behind the first two of its tokens
        text, end = [(7 * place + 1) % VOCAB for place in range(length)], (length // 8 + 1) * 8
        slot, reused = runner.cache.acquire(text, 8)
        canvas = list(range(100, 100 + end - length))
        runner.forward([Row(slot, text[reused:], Block(canvas, bidirectional=True), span=8)])
        runner.cache.commit(slot, text[reused:-1])
        block = Block(canvas[:size], bidirectional=True, suffix=len(canvas) - size)
        rows.append(Row(slot, text[-1:], block, span=8))
        expected.append(logits_of(model, [*text, *canvas], 8)[length - 1 : length + size])
    torch.testing.assert_close(runner.forward(rows), torch.cat(expected), atol=1e-4, rtol=1e-4)
    for row, plain in zip(rows, expected, strict=True):
        torch.testing.assert_close(runner.forward([row]), plain, atol=1e-4, rtol=1e-4)


def test_recurrent_models_are_refused() -> None:
    with pytest.raises(ModelError, match="roll back"):
        Runner(tiny_model("mamba"))


def test_a_sequence_ends_where_the_angles_of_its_neighbours_would_change() -> None:
    """LongRoPE: one long sequence turns every token of the step by other angles."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 5.0, 9.0]}
    model = tiny_model("llama", rope_parameters=rope | {"original_max_position_embeddings": 32})
    assert (
        Runner(model, slots=2, capacity=128).cache.capacity == 32 < tiny_model("llama").config.max_position_embeddings
    )
