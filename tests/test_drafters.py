"""Drafters that learn from texts and verifications: what they propose, and that answers stay the model's."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as List
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import decoding
from decoding import drafting
from decoding.backends.local import LocalBackend
from decoding.drafting import Drafter
from decoding.engine.block import Block, Commit, layout
from decoding.engine.engine import Engine
from decoding.engine.output import Output
from decoding.engine.runner import Runner
from decoding.engine.sequence import Sequence
from decoding.errors import InvalidRequest, RecordError
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.speculative import SpeculativeDecoder
from decoding.types import SamplingParams
from drafters import PromptLookup, Suffix, TokenRecycling
from drafters.token_recycling import most_likely
from tests.greedy import greedy_reference, prompts, run
from tests.tiny import EOS, tiny_model, tiny_tokenizer

LEARNERS = (Suffix, TokenRecycling)
_ids = itertools.count()


def text(prompt: list[int], answer: List[int] = ()) -> Sequence:
    """A sequence as a drafter sees it."""
    sequence = Sequence(
        id=next(_ids),
        prompt=prompt,
        params=SamplingParams(),
        decoder=AutoregressiveDecoder(),
        eos=frozenset(),
        limit=10_000,
        submitted=0.0,
    )
    sequence.tokens += answer
    return sequence


def guesses(drafter: Drafter, tokens: list[int], length: int) -> list[int]:
    """A chain of guesses behind a text of its own."""
    sequence = text(tokens)
    (draft,) = drafter.propose([sequence], [length])
    drafter.forget(sequence)
    return list(draft.block.tokens)


def remember(drafter: Drafter, *answers: list[int]) -> None:
    for answer in answers:
        drafter.forget(text([1], answer))


def accepted(sequences: List[Sequence]) -> int:
    return sum(step.accepted for s in sequences for step in s.trace)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("make", LEARNERS)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "ragged batch"])
def test_greedy_tokens_equal_plain_decoding(make: type[Drafter], kind: str, together: bool) -> None:
    model = tiny_model(kind)
    engine = Engine(Runner(model, slots=8, capacity=96))
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    decoder = SpeculativeDecoder(make(), 6)
    inputs = prompts(6, seed=3)
    expected = [greedy_reference(model, prompt, 24) for prompt in inputs]
    # Every prompt comes twice: the second time, what was learned is put to use.
    batches = [inputs, inputs] if together else [[prompt] for prompt in inputs * 2]
    results = [s for batch in batches for s in run(engine, [(p, decoder) for p in batch], params)]
    assert [s.error for s in results] == [None] * 12
    assert [s.new_tokens for s in results] == expected * 2
    assert accepted(results) > 0, "no guess was ever accepted, so nothing was tested"
    if make is Suffix:  # an answer that it knows is copied in whole drafts
        assert accepted(results[6:]) > 1.5 * accepted(results[:6])


def test_token_recycling_drafts_trees_that_are_accepted_off_the_first_branch() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=8, capacity=96))
    branched: list[List[int]] = []

    class Watched(TokenRecycling):
        def observe(self, sequences: List[Sequence], output: Output, commits: List[Commit]) -> None:
            branched.extend(commit.path for commit in commits if commit.path and commit.path[0] > 0)
            super().observe(sequences, output, commits)

    decoder = SpeculativeDecoder(Watched(), 6)
    run(engine, [(p, decoder) for p in prompts(8, seed=3)], SamplingParams(max_new_tokens=32, ignore_eos=True))
    assert branched, "of the root's children, no other than the first was ever accepted"


# Four tokens, two of them guessed at most: few enough outcomes to count, all kinds of verification in them.
_SMALL: dict[str, Any] = {
    "vocab_size": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.15,
}


class KeepsTheFirstGuess(SpeculativeDecoder):
    """The negative control: does not verify."""

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        commits = super().commit(sequences, output)
        for i, (block, commit) in enumerate(zip(output.blocks, commits, strict=True)):
            if block and len(commit.tokens) == 1:
                commits[i] = Commit([block.tokens[0], int(output.best(i)[1])], [0])
        return commits


def outcomes(
    drafter: Drafter,
    decoder: Callable[[Drafter, int], SpeculativeDecoder],
    requests: int,
    *,
    rejects: bool = True,
    attach: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected counts of every answer of four tokens at temperature 1. rejects: some guesses must be.
    attach: the drafter guesses with the model itself."""
    model = tiny_model("llama", **_SMALL)
    prompt, new = [1, 2, 3, 1, 2], 4
    backend = LocalBackend(model, tiny_tokenizer(), slots=64, capacity=16)
    engine = backend.engine
    if attach:
        drafter.attach(backend)
    speculative = decoder(drafter, 2)
    sequences = [
        engine.submit(prompt, SamplingParams(temperature=1.0, max_new_tokens=new, seed=seed), speculative)
        for seed in range(requests)
    ]
    while engine.busy:
        engine.step()
    drafted = sum(step.drafted for s in sequences for step in s.trace)
    assert drafted > requests and 0 < accepted(sequences) < drafted + (not rejects)
    answers = torch.tensor(list(itertools.product(range(4), repeat=new)))
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([prompt] * len(answers)), answers], dim=1)).logits
    chances = logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    expected = chances.gather(2, answers[..., None])[..., 0].sum(-1).exp().numpy() * requests
    cells = np.array([s.new_tokens for s in sequences]) @ (4 ** np.arange(new - 1, -1, -1))
    return np.bincount(cells, minlength=len(answers)), expected


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """p-value; rare outcomes are counted as one."""
    rare = expected < 8
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    return float(stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue)


@pytest.mark.parametrize("name", ["suffix(memory=256)", "token-recycling(nodes=5, width=2)"])
def test_sampling_keeps_the_models_distribution(name: str) -> None:
    assert chi_square(*outcomes(drafting.find(name), SpeculativeDecoder, 2500)) > 1e-4
    assert chi_square(*outcomes(drafting.find(name), KeepsTheFirstGuess, 800)) < 1e-6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("suffix(depth=0)", "depth"),
        ("suffix(depth=2.5)", "depth"),
        ("suffix(threshold=0)", "threshold"),
        ("suffix(threshold=high)", "threshold"),
        ("suffix(factor=-1)", "factor"),
        ("suffix(memory=-1)", "memory"),
        ("suffix(reach=3)", "reach"),
        ("token-recycling(nodes=0)", "nodes"),
        ("token-recycling(width=many)", "width"),
        ("prompt-lookup(max_ngram=2.5)", "max_ngram"),
        ("prompt-lookup(max_ngram=3, min_ngram=true)", "min_ngram"),
        ("prompt-lookup(max_ngram=many)", "max_ngram"),
        ("layer-skip(layers=true)", "layers"),
        ("eagle3(nodes=true)", "nodes"),
        ("eagle3(top_k=true)", "top_k"),
        ("medusa(nodes=true)", "nodes"),
    ],
)
def test_bad_options_are_refused_by_name(options: str, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        drafting.find(options)
    with pytest.raises(InvalidRequest, match="path"):
        Suffix(path=3)  # type: ignore[arg-type]


def test_suffix_repeats_what_the_text_repeats() -> None:
    assert guesses(Suffix(), [5, 1, 2, 3, 9, 1, 2, 3, 9, 1, 2], 2) == [3, 9]
    assert guesses(Suffix(factor=9), [1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1], "past the end, it goes on"
    assert guesses(Suffix(), [1, 2, 3, 4], 4) == []


def test_suffix_prefers_the_more_frequent_then_the_later() -> None:
    assert guesses(Suffix(), [5, 7, 5, 7, 5, 8, 5], 1) == [7]
    assert guesses(Suffix(), [5, 7, 5, 8, 5], 1) == [8]


def test_suffix_stops_where_the_chance_falls_below_the_threshold() -> None:
    memory = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 4, 3], [5, 6, 4, 2]]
    for threshold, expected in ((0.2, 3), (0.4, 2), (0.6, 1)):
        drafter = Suffix(threshold=threshold, factor=9)
        remember(drafter, *memory)
        assert len(guesses(drafter, [5], 5)) == expected


def test_suffix_takes_the_more_promising_of_text_and_memory() -> None:
    drafter = Suffix()
    remember(drafter, [1, 2, 3, 7, 7, 7])
    assert guesses(drafter, [0, 1, 2, 3], 3) == [7, 7, 7], "only the memory knows it"
    assert guesses(drafter, [1, 2, 3, 8, 8, 8, 0, 1, 2, 3], 3) == [8, 8, 8], "the text itself comes first"
    assert guesses(drafter, [9, 3, 8, 8, 8, 1, 2, 3], 3) == [7, 7, 7], "the longer match promises more"


def test_suffix_learns_from_answers_under_way() -> None:
    drafter = Suffix()
    ahead, behind = text([1, 2], [3, 4, 5, 6]), text([7], [3, 4])
    _, draft = drafter.propose([ahead, behind], [2, 2])
    assert draft.block.tokens == [5, 6]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), max_size=4),
    st.integers(1, 5),
)
def test_suffix_counts_like_a_suffix_tree(own: list[int], memory: list[list[int]], depth: int) -> None:
    """One guess: the counts of every match length, spelled out."""
    drafter = Suffix(depth=depth, threshold=1e-6)
    remember(drafter, *memory)
    scores: dict[int, float] = {}
    for matched in range(1, min(depth, len(own)) + 1):
        end = own[-matched:]
        for texts in ([own], memory):
            after = Counter(
                t[at + matched] for t in texts for at in range(len(t) - matched) if t[at : at + matched] == end
            )
            if after:
                best = max(after.values())
                for token in (t for t, count in after.items() if count == best):
                    scores[token] = max(scores.get(token, 0), best / after.total())
    found = guesses(drafter, own, 1)
    assert bool(found) == bool(scores)
    if found:
        assert scores.get(found[0]) == pytest.approx(max(scores.values()))


def test_suffix_memory_is_bounded_and_the_oldest_answers_go() -> None:
    drafter = Suffix(memory=10)
    remember(drafter, [1, 11, 21], [2, 12, 22], [3, 13, 23])
    assert [guesses(drafter, [first], 1) for first in (1, 2, 3)] == [[], [12], [13]]
    remember(drafter, list(range(50, 90)))
    assert guesses(drafter, [88], 1) == [89] and guesses(drafter, [60], 1) == []
    remember(drafter, *([[i, i + 1] for i in range(200)]))
    assert len(drafter._answers.tokens) <= 10
    empty = Suffix(memory=0)
    remember(empty, [1, 2, 3])
    assert guesses(empty, [1], 1) == []


def test_forgetting_frees_what_a_sequence_had() -> None:
    drafter = Suffix(memory=64)
    model = tiny_model("llama")
    decoder = SpeculativeDecoder(drafter, 4)
    engine = Engine(Runner(model, slots=4, capacity=64))
    run(engine, [(p, decoder) for p in prompts(20)], SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert not drafter._texts and len(drafter._answers.tokens) <= 64


def test_suffix_memory_survives_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.npz"
    first = Suffix()
    remember(first, [1, 2, 3], [4, 5])
    first.save(path)
    second = Suffix()
    second.load(path)
    assert np.array_equal(second._answers.tokens, first._answers.tokens)
    assert guesses(second, [1], 1) == [2] and guesses(second, [3], 1) == []


def test_a_path_is_read_when_attached_and_written_when_let_go(tmp_path: Path) -> None:
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=1, capacity=16)
    path = str(tmp_path / "answers.npz")
    first = Suffix(path=path)
    first.attach(backend)
    remember(first, [1, 2, 3])
    del first
    gc.collect()
    second = Suffix(path=path)
    assert guesses(second, [1], 1) == [], "nothing is read before a backend is attached"
    second.attach(backend)
    assert guesses(second, [1], 1) == [2]
    remember(second, [9, 9999])
    second.save(path)
    with pytest.raises(InvalidRequest, match="9999"):
        Suffix(path=path).attach(backend)


def test_unlearning_goes_back_to_the_answers_of_the_path_and_the_file_gains_all(tmp_path: Path) -> None:
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=1, capacity=16)
    path = str(tmp_path / "answers.npz")
    before = Suffix()
    remember(before, [1, 2, 3])
    before.save(path)
    drafter = Suffix(path=path)
    drafter.attach(backend)
    for _ in range(2):
        remember(drafter, [4, 5, 6])
        assert (guesses(drafter, [1], 1), guesses(drafter, [4], 1)) == ([2], [5])
        drafter.unlearn()
        assert (guesses(drafter, [1], 1), guesses(drafter, [4], 1)) == ([2], [])
    del drafter
    gc.collect()
    after = Suffix()
    after.load(path)
    assert (guesses(after, [1], 1), guesses(after, [4], 1)) == ([2], [5])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "pickle", "other", "folder"])
def test_a_damaged_file_is_a_clear_error(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.npz"
    good = Suffix()
    remember(good, list(range(500)))
    good.save(path)
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "pickle":
        np.savez(path, tokens=np.array([{}, None], dtype=object))
    elif damage == "other":
        np.savez(path, tokens=np.zeros((2, 2)))
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(RecordError, match=r"answers\.npz"):
        Suffix().load(path)


def output_of(sequence: Sequence, block: Block, logits: torch.Tensor) -> Output:
    return Output.judge([sequence], [block], logits)


def test_token_recycling_unfolds_what_was_likely() -> None:
    drafter = TokenRecycling(nodes=6, width=2)
    sequence = text([1])
    assert drafter.propose([sequence], [3])[0].block == Block(), "nothing is known yet"
    logits = torch.zeros(2, 10)
    logits[0, 2], logits[0, 3] = 9, 8  # behind 1 come 2 or 3
    logits[1, 1], logits[1, 4] = 9, 8  # behind 2 come 1 or 4
    drafter.observe([sequence], output_of(sequence, Block([2]), logits), [Commit([2, 1])])
    (draft,) = drafter.propose([sequence], [2])
    parents = draft.block.parents
    assert parents is not None and draft.confidence is not None
    assert draft.confidence == sorted(draft.confidence, reverse=True), "of two children, the likelier comes first"
    paths = set()
    for node, token in enumerate(draft.block.tokens):
        above = parents[node]
        paths.add((token,) if above < 0 else (draft.block.tokens[above], token))
    assert {(2,), (3,), (2, 1)} <= paths <= {(2,), (3,), (2, 1), (2, 4)}
    assert drafter.propose([sequence], [1])[0].block == Block([2, 3], [-1, -1])
    assert drafter.propose([sequence], [0])[0].block == Block()
    assert drafter.propose([text([3]), text([7])], [3, 3]) == [drafting.Draft()] * 2


def test_token_recycling_lets_the_confirmed_context_win() -> None:
    drafter = TokenRecycling(nodes=1, width=1)
    sequence, block = text([1]), Block([5, 6, 5], [-1, 0, -1])
    logits = torch.zeros(4, 10)
    logits[0, 5], logits[1, 6], logits[2, 7], logits[3, 8] = 9, 9, 9, 9  # behind 5: 6 if accepted, 8 in the twin
    drafter.observe([sequence], output_of(sequence, block, logits), [Commit([5, 6, 7], [0, 1])])
    assert drafter.propose([text([5])], [1])[0].block.tokens == [6]


@pytest.mark.parametrize(("nodes", "width"), [(1, 1), (5, 1), (48, 8), (60, 3)])
def test_the_tree_holds_the_likeliest_branches_of_what_is_known(nodes: int, width: int) -> None:
    drafter = TokenRecycling(nodes=nodes, width=width)
    vocab, random = 50, np.random.default_rng(1)
    drafter._table = np.stack([random.permutation(vocab)[:width] for _ in range(vocab)]).astype(np.int32)
    drafter._share = -np.sort(-random.dirichlet(np.ones(width) * 0.3, vocab), axis=1)
    for length in range(1, 9):
        (draft,) = drafter.propose([text([3])], [length])
        block = draft.block
        block.check(vocab)
        assert block.parents is not None and draft.confidence is not None and 1 <= len(block) <= nodes
        shape = layout(len(block), 1, tuple(block.parents), False)
        assert shape.depth.max() <= length
        assert max(Counter(block.parents).values()) <= width
        branch: list[float] = []
        for parent, chance in zip(block.parents, draft.confidence, strict=True):
            branch.append(chance if parent < 0 else chance * branch[parent])
        assert branch == sorted(branch, reverse=True), "the likeliest come first, so none that is likelier is left out"


@pytest.mark.parametrize("vocab", [7, 64, 1000, 2048])
def test_the_most_likely_tokens_are_those_of_a_full_sort(vocab: int) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    values, ids = most_likely(logits, 6)
    assert torch.equal(values, logits.sort(dim=-1, descending=True).values[:, :6])
    assert torch.equal(logits.gather(1, ids), values)


def test_token_recycling_needs_no_more_tokens_than_the_vocabulary_has() -> None:
    drafter = TokenRecycling(nodes=20, width=8)
    sequence = text([1])
    assert drafter.propose([sequence], [1]) == [drafting.Draft()]
    drafter.observe([sequence], output_of(sequence, Block(), torch.zeros(1, 3)), [Commit([0])])
    (draft,) = drafter.propose([sequence], [1])
    assert sorted(draft.block.tokens) == [0, 1, 2]


def test_a_longer_match_is_worth_more_and_every_occurrence_has_a_vote() -> None:
    short, long = [9, 1, 5, 8, 1], [7, 6, 1, 5, 8, 7, 6, 1]
    for drafter in (PromptLookup(), Suffix()):
        (of_short,), (of_long,) = (drafter.propose([text(tokens)], [2]) for tokens in (short, long))
        assert of_short.confidence is not None and of_long.confidence is not None
        assert of_short.confidence[0] < of_long.confidence[0] < of_long.confidence[-1] < 1
    (once,), (often,) = (Suffix().propose([text([5, 7] * n + [5])], [1]) for n in (1, 9))
    assert once.confidence is not None and often.confidence is not None
    assert often.confidence[0] > once.confidence[0]


@pytest.mark.parametrize("text", ["suffix", "token-recycling"])
def test_a_forgetful_backend_starts_every_answer_afresh(text: str) -> None:
    lm = decoding.LocalBackend(tiny_model("llama"), tiny_tokenizer(), eos=[EOS], slots=2, capacity=256)
    # What pays depends on what was learnt of the text, and not on what steps take here and now.
    lm.live = SimpleNamespace(cost=lambda tokens, *_: 1.0 + 0.01 * np.asarray(tokens))  # type: ignore[assignment]
    params = decoding.SamplingParams(max_new_tokens=32, ignore_eos=True)

    def accepted() -> int:
        return decoding.generate("abcabc", lm, strategy=f"speculative(drafter={text})", params=params).metrics.accepted

    first = accepted()
    taught = accepted()
    lm.forget()
    assert accepted() == first
    assert text != "suffix" or taught > first, "it learned nothing, so nothing was forgotten"
