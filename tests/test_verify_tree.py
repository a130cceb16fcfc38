"""Verification of trees: exact laws by enumeration, each beside a verifier that is wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from decoding.engine import verify_tree as module
from decoding.engine.sampling import draw, draw_distinct, uniforms
from decoding.engine.verify import Verdict, verify_block, verify_greedy
from decoding.engine.verify_tree import (
    typical_acceptance,
    verify_traversal,
    verify_tree_greedy,
    verify_tree_sampled,
    verify_tree_topk,
)
from tests.verification_law import (
    LANGUAGES,
    Drafted,
    Language,
    Outcome,
    Text,
    draw_drafts,
    languages,
    outcome,
)

Sampled = Callable[..., Verdict]
SAMPLED: list[Sampled] = [verify_tree_sampled, verify_traversal]
VOCAB = 3
SHAPES = {
    "empty": [],
    "chain": [-1, 0],
    "star": [-1, -1, -1],
    "breadth first": [-1, -1, 0, 1],
    "depth first": [-1, 0, 0, -1],
    "five": [-1, 0, -1, 0, 2],
}


def depth_of(parents: Sequence[int]) -> int:
    depths = [0]
    for parent in parents:
        depths.append(depths[parent + 1] + 1)
    return max(depths)


def measure(
    verify: Sampled, target: Language, drafter: Language, shape: str, *, replacement: bool, told: bool | None = None
) -> Outcome:
    """`told` is what the verifier is told about replacement, the truth by default."""
    parents = SHAPES[shape]
    drafted = draw_drafts(drafter, parents, replacement=replacement)
    tokens, p, q = drafted.tokens, drafted.distributions(target), drafted.distributions(drafter)
    above = torch.tensor(parents, dtype=torch.long).expand_as(tokens)
    verifier = partial(verify, replacement=replacement if told is None else told)
    return outcome(
        lambda rows, u: verifier(tokens[rows], above[rows], p[rows], q[rows], u),
        drafted,
        target,
        depth_of(parents) + 1,
    )


@lru_cache
def sound(verify: Sampled, name: str, shape: str, replacement: bool) -> Outcome:
    """`measure` for several tests; not for those that break something."""
    return measure(verify, *languages(name, VOCAB, 4), shape, replacement=replacement)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "five"])
@pytest.mark.parametrize("verify", SAMPLED)
def test_sampled_trees_leave_the_target_distribution_unchanged(verify: Sampled, shape: str, replacement: bool) -> None:
    few = {"breadth first": ["random", "zeros"], "depth first": ["random", "one-hot drafter"]}
    for name in LANGUAGES if shape == "star" else few.get(shape, ["random"]):
        assert sound(verify, name, shape, replacement).distance <= 1e-9, name


@pytest.mark.parametrize("verify", SAMPLED)
def test_a_tree_with_more_branches_is_no_different(verify: Sampled) -> None:
    assert sound(verify, "random", "five", False).distance <= 1e-9


def top_children(target: Language, shape: str) -> tuple[Drafted, Tensor]:
    """A tree in which every node has distinct children, chosen without a draw."""
    generator = torch.Generator().manual_seed(0)
    parents = SHAPES[shape]
    texts: list[Text | None] = [()]
    for parent in parents:
        above = texts[parent + 1]
        assert above is not None
        taken = [t[-1] for n, t in enumerate(texts[1:]) if parents[n] == parent and t is not None]
        free = [token for token in range(target.vocab) if token not in taken]
        texts.append((*above, free[int(torch.randint(len(free), (1,), generator=generator))]))
    return Drafted([1.0], [texts], parents), torch.tensor([parents], dtype=torch.long)


def measure_topk(target: Language, shape: str) -> Outcome:
    drafted, above = top_children(target, shape)
    tokens, p = drafted.tokens, drafted.distributions(target)
    return outcome(
        lambda rows, u: verify_tree_topk(tokens[rows], above[rows], p[rows], u),
        drafted,
        target,
        depth_of(SHAPES[shape]) + 1,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LANGUAGES)
def test_deterministic_trees_leave_the_target_distribution_unchanged(name: str, shape: str) -> None:
    target, _ = languages(name, VOCAB, 4)
    assert measure_topk(target, shape).distance <= 1e-9


def test_a_deterministic_tree_is_left_where_the_target_leaves_it() -> None:
    """The probability of keeping a node is that of the text down to it."""
    target, _ = languages("random", VOCAB, 4)
    drafted, _ = top_children(target, "breadth first")
    reached = [dict(target.joint((), len(text)))[text] for text in drafted.texts[0][1:] if text]
    assert measure_topk(target, "breadth first").accepted == pytest.approx(sum(reached), abs=1e-9)


@pytest.mark.parametrize("name", LANGUAGES)
def test_traversal_of_a_chain_is_block_verification(name: str) -> None:
    target, drafter = languages(name, VOCAB, 4)
    parents = range(-1, 2)
    drafted = draw_drafts(drafter, parents, replacement=True)
    tokens, p, q = drafted.tokens, drafted.distributions(target), drafted.distributions(drafter)
    above = torch.tensor(parents).expand_as(tokens)
    u = torch.rand(len(tokens), 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for replacement in (False, True):
        traversed = verify_traversal(tokens, above, p, q, u, replacement=replacement)
        assert_same(traversed, verify_block(tokens, p, q[:, :-1], u))


@pytest.mark.parametrize("replacement", [False, True])
def test_traversal_keeps_more_than_top_down_rejection(replacement: bool) -> None:
    """Not a theorem for every pair of distributions; it holds, with room, for these."""
    for shape in ("breadth first", "depth first"):
        down, up = (sound(verify, "random", shape, replacement).accepted for verify in SAMPLED)
        assert up > down + 1e-3


@pytest.mark.parametrize("verify", SAMPLED)
def test_misjudging_how_children_were_drawn_is_caught(verify: Sampled) -> None:
    target, drafter = languages("random", VOCAB, 4)
    for truth in (False, True):
        assert measure(verify, target, drafter, "star", replacement=truth, told=not truth).distance > 1e-3


@pytest.mark.parametrize("verify", SAMPLED)
def test_another_draft_distribution_is_caught(verify: Sampled) -> None:
    target, drafter = languages("random", VOCAB, 4)

    def misled(tokens: Tensor, above: Tensor, p: Tensor, q: Tensor, u: Tensor, *, replacement: bool) -> Verdict:
        return verify(tokens, above, p, q.bfloat16().double(), u, replacement=replacement)

    assert measure(misled, target, drafter, "depth first", replacement=False).distance > 1e-5


def _forget_what_rejections_have_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module._Rest, "distribution", lambda rest, end: rest.target[torch.arange(len(end)), end].double()
    )


@pytest.mark.parametrize("verify", SAMPLED)
def test_forgetting_what_rejections_have_spent_is_caught(verify: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = languages("random", VOCAB, 4)
    _forget_what_rejections_have_spent(monkeypatch)
    assert measure(verify, target, drafter, "depth first", replacement=False).distance > 1e-3


def test_walking_a_tree_in_another_order_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breadth first, or siblings from the last to the first, is not the order they were drawn in."""
    walk = module._walk

    def backwards(parents: Tensor) -> tuple[Tensor, Tensor]:
        nodes, leaving = walk(parents)
        return nodes.flip(1), ~leaving.flip(1)

    target, drafter = languages("random", VOCAB, 4)
    monkeypatch.setattr(module, "_walk", backwards)
    assert measure(verify_traversal, target, drafter, "star", replacement=False).distance > 1e-3


def test_not_renormalizing_between_deterministic_children_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_elder_siblings", lambda parents, valid: torch.zeros(1, 1, 1, dtype=torch.bool))
    target, _ = languages("random", VOCAB, 4)
    assert measure_topk(target, "star").distance > 1e-2


def test_top_down_rejection_with_distributions_is_lossy_for_deterministic_children() -> None:
    """The reason for a verifier of their own."""
    target, drafter = languages("random", VOCAB, 4)
    drafted, above = top_children(target, "star")
    tokens, p, q = drafted.tokens, drafted.distributions(target), drafted.distributions(drafter)
    result = outcome(
        lambda rows, u: verify_tree_sampled(tokens[rows], above[rows], p[rows], q[rows], u, replacement=False),
        drafted,
        target,
        2,
    )
    assert result.distance > 1e-2


def test_typical_acceptance_is_lossy() -> None:
    target, _ = languages("random", VOCAB, 4)
    drafted, above = top_children(target, "chain")
    tokens, p = drafted.tokens, drafted.distributions(target)
    result = outcome(
        lambda rows, u: typical_acceptance(tokens[rows], above[rows], p[rows], u, threshold=0.01), drafted, target, 3
    )
    assert result.distance > 1e-2


def test_typical_acceptance_takes_plausible_tokens_and_draws_the_last() -> None:
    """With entropy H the bar is min(0.3, 0.09 · exp(-H)): 0.09 if p is one-hot, 0.03 for three even choices."""
    p = torch.tensor([[[0.9, 0.05, 0.05], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]] * 2).double()
    parents = torch.tensor([[-1, 0, 1], [-1, 0, 1]])
    u = torch.full((2, 4), 0.5, dtype=torch.double)
    verdict = typical_acceptance(torch.tensor([[0, 2, 0], [0, 1, 1]]), parents, p, u)
    assert verdict.accepted.tolist() == [3, 2]
    assert verdict.bonus.tolist() == [2, 0]
    # H(p) at the root is 0.394 nats, the bar 0.0607: a token of 0.05 is implausible there.
    assert typical_acceptance(torch.tensor([[1, 0, 0]]), parents[:1], p[:1], u[:1]).accepted.tolist() == [0]


def test_greedy_follows_the_targets_choices_down_the_tree() -> None:
    tokens = torch.tensor([[4, 5, 6, 7, 8], [4, 5, 6, 7, -1], [9, 9, 1, 2, -1], [3, 3, 3, -1, -1]])
    parents = torch.tensor([[-1, -1, 1, 1, 3], [-1, 0, 1, 0, -1], [-1, -1, 0, 1, -1], [-1, 0, 1, -1, -1]])
    best = torch.tensor(
        [
            [5, 0, 7, 0, 8, 6],  # 5, then its second child 7, then 8
            [4, 7, 0, 0, 2, 0],  # 4, then 7
            [9, 2, 2, 0, 1, 0],  # the second of two equal children goes deeper
            [0, 3, 3, 3, 0, 0],  # nothing, though everything below fits
        ]
    )
    verdict = verify_tree_greedy(tokens, parents, best)
    assert verdict.accepted.tolist() == [3, 2, 2, 0]
    assert verdict.path.tolist() == [[1, 3, 4, -1, -1], [0, 3, -1, -1, -1], [1, 3, -1, -1, -1], [-1] * 5]
    assert verdict.bonus.tolist() == [6, 2, 1, 0]


def test_greedy_on_a_chain_is_chain_verification() -> None:
    generator = torch.Generator().manual_seed(0)
    draft = torch.randint(0, 2, (200, 9), generator=generator)
    draft = torch.where(torch.arange(9) < torch.randint(0, 10, (200, 1), generator=generator), draft, -1)
    best = torch.randint(0, 2, (200, 10), generator=generator)
    assert_same(verify_tree_greedy(draft, torch.arange(-1, 8).expand(200, 9), best), verify_greedy(draft, best))


def assert_same(a: Verdict, b: Verdict) -> None:
    assert torch.equal(a.accepted, b.accepted)
    assert torch.equal(a.path, b.path)
    assert torch.equal(a.bonus, b.bonus)


Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def random_batch(rows: int = 80, nodes: int = 9, vocab: int = 7) -> Batch:
    """Ragged random trees over agreeing p and q, with garbage where nothing may look."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(rows, nodes + 1, vocab, generator=generator, dtype=torch.double) ** 3 + 1e-3
    q = p * (0.3 + torch.rand(p.shape, generator=generator, dtype=torch.double))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    parents = torch.stack([torch.randint(-1, n, (rows,), generator=generator) for n in range(nodes)], dim=1)
    tokens = torch.full((rows, nodes), -1)
    for row in range(rows):
        left = q[row].clone()
        for node in range(nodes):
            weights = left[parents[row, node] + 1]
            if weights.sum() > 0:
                tokens[row, node] = weights.multinomial(1, generator=generator)
                weights[tokens[row, node]] = 0
    padding = torch.arange(nodes) >= torch.randint(0, nodes + 1, (rows, 1), generator=generator)
    tokens, parents = tokens.masked_fill(padding, -1), parents.masked_fill(padding, -1)
    p[:, 1:][padding] = torch.nan
    q[:, 1:][padding] = torch.nan
    return tokens, parents, p, q, torch.rand(rows, nodes + 1, generator=generator, dtype=torch.double)


VERIFIERS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Verdict]] = {
    "greedy": lambda tokens, parents, p, q, u: verify_tree_greedy(tokens, parents, p.argmax(-1)),
    "topk": lambda tokens, parents, p, q, u: verify_tree_topk(tokens, parents, p, u),
    "sampled": partial(verify_tree_sampled, replacement=False),
    "sampled, replacement": partial(verify_tree_sampled, replacement=True),
    "traversal": partial(verify_traversal, replacement=False),
    "traversal, replacement": partial(verify_traversal, replacement=True),
    "typical": lambda tokens, parents, p, q, u: typical_acceptance(tokens, parents, p, u),
}


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_sequence_gets_the_same_verdict_alone_and_in_any_batch(name: str) -> None:
    tokens, parents, p, q, u = random_batch()
    batch = VERIFIERS[name](tokens, parents, p, q, u)
    assert len(set(batch.accepted.tolist())) >= 3
    for row in range(len(tokens)):
        own, count = slice(row, row + 1), int((tokens[row] >= 0).nonzero().max()) + 1 if (tokens[row] >= 0).any() else 0
        alone = VERIFIERS[name](
            tokens[own, :count], parents[own, :count], p[own, : count + 1], q[own, : count + 1], u[own, : count + 1]
        )
        assert alone.accepted == batch.accepted[row]
        assert alone.bonus == batch.bonus[row]
        assert torch.equal(alone.path[0], batch.path[row, :count])
        assert (batch.path[row, count:] == -1).all()


@pytest.mark.parametrize("name", VERIFIERS)
def test_paths_follow_the_tree(name: str) -> None:
    tokens, parents, p, q, u = random_batch()
    verdict = VERIFIERS[name](tokens, parents, p, q, u)
    for row in range(len(tokens)):
        path = verdict.path[row, : verdict.accepted[row]].tolist()
        assert [int(parents[row, node]) for node in path] == [-1, *path][:-1]
        assert all(tokens[row, node] >= 0 for node in path)
        assert (verdict.path[row, len(path) :] == -1).all()


@pytest.mark.parametrize("name", VERIFIERS)
def test_verdicts_are_the_same_where_no_row_may_be_skipped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch()
    skipping = VERIFIERS[name](*batch)
    monkeypatch.setattr(module, "rows_worth_visiting", lambda wanted: torch.arange(len(wanted)))
    assert_same(VERIFIERS[name](*batch), skipping)


@pytest.mark.parametrize("name", VERIFIERS)
def test_verification_never_waits_for_the_device(name: str) -> None:
    """Meta tensors have no values, so anything that asks for one raises."""
    tokens, parents, p, q, u = (x[:2, :5].to("meta") for x in random_batch())
    assert VERIFIERS[name](tokens[:, :4], parents[:, :4], p, q, u).path.shape == (2, 4)


def _two_tokens(verify: Sampled, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected counts of the first two tokens: two children drawn at the root, one below each."""
    target, drafter = languages("random", VOCAB, 3)
    seed, step = torch.arange(rows), torch.zeros(rows, dtype=torch.long)
    p_next = torch.stack([target.next[()]] + [target.next[(a,)] for a in range(VOCAB)])  # [1 + V, V]
    q_next = torch.stack([drafter.next[()]] + [drafter.next[(a,)] for a in range(VOCAB)])
    drafting = uniforms(seed, step, 0, 5)
    first = draw_distinct(q_next[:1].expand(rows, -1), drafting[:, :2])  # [rows, 2]
    below = [draw(q_next[1 + first[:, i]], drafting[:, 2 + i]) for i in range(2)]
    tokens = torch.stack([first[:, 0], first[:, 1], *below], dim=1)
    parents = torch.tensor([-1, -1, 0, 1]).expand(rows, 4)
    state = torch.cat([torch.zeros(rows, 1, dtype=torch.long), 1 + first], dim=1)
    last = p_next[:1].expand(rows, 2, -1)  # behind the leaves: any distribution does
    p, q = torch.cat([p_next[state], last], dim=1), torch.cat([q_next[state], last], dim=1)
    verdict = verify(tokens, parents, p, q, uniforms(seed, step, 1, 5), replacement=False)
    kept = tokens.gather(1, verdict.path.clamp(min=0))
    start = torch.where(verdict.accepted > 0, kept[:, 0], verdict.bonus)
    own = draw(p_next[1 + start], drafting[:, 4])
    second = torch.where(verdict.accepted > 1, kept[:, 1], torch.where(verdict.accepted > 0, verdict.bonus, own))
    observed = np.bincount((start * VOCAB + second).numpy(), minlength=VOCAB**2)
    return observed, np.array([probability for _, probability in target.joint((), 2)]) * rows


@pytest.mark.parametrize("verify", SAMPLED)
def test_many_samples_agree_with_the_target(verify: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stats.chisquare(*_two_tokens(verify, 40000)).pvalue > 1e-4
    _forget_what_rejections_have_spent(monkeypatch)
    assert stats.chisquare(*_two_tokens(verify, 40000)).pvalue < 1e-6
