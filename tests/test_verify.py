"""Verification of chains: exact laws by enumeration, each beside a verifier that is wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from decoding.engine import verify as module
from decoding.engine.sampling import draw, uniforms
from decoding.engine.verify import Verdict, verify_block, verify_greedy, verify_rejection
from tests.verification_law import LANGUAGES, Drafted, Language, Outcome, Verify, draw_drafts, languages, outcome

Chain = Callable[[Tensor, Tensor, Tensor | None, Tensor], Verdict]
LOSSLESS: list[Chain] = [verify_rejection, verify_block]
VOCAB, WIDTH = 3, 3


def run(
    chain: Chain, drafted: Drafted, target: Language, drafter: Language | None, width: int = WIDTH
) -> tuple[Verify, int]:
    """The verifier over all drafts, padded to `width`, and the length of the texts to compare."""
    length = len(drafted.parents)
    tokens = torch.nn.functional.pad(drafted.tokens, (0, width - length), value=-1)
    pad = (0, 0, 0, width - length)
    p = torch.nn.functional.pad(drafted.distributions(target), pad, value=torch.nan)
    q = None if drafter is None else torch.nn.functional.pad(drafted.distributions(drafter)[:, :-1], pad, value=9.0)

    def verify(rows: Tensor, u: Tensor) -> Verdict:
        u = torch.nn.functional.pad(u, (0, width - length), value=0.5)
        return chain(tokens[rows], p[rows], None if q is None else q[rows], u)

    return verify, length + 1


def measure(
    chain: Chain, target: Language, drafter: Language, length: int = WIDTH, *, deterministic: bool = False
) -> Outcome:
    drafted = draw_drafts(drafter, range(-1, length - 1), replacement=True)
    verify, total = run(chain, drafted, target, None if deterministic else drafter)
    return outcome(verify, drafted, target, total)


def lengths(name: str) -> range:
    """Drafts of every length where it costs little, of the full length only elsewhere."""
    return range(WIDTH + 1) if name in ("random", "zeros") else range(WIDTH, WIDTH + 1)


@lru_cache
def sound(chain: Chain, name: str, length: int) -> Outcome:
    """`measure` for several tests; not for those that break something."""
    return measure(chain, *languages(name, VOCAB, WIDTH + 1), length)


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("chain", LOSSLESS)
def test_sampled_drafts_leave_the_target_distribution_unchanged(chain: Chain, name: str) -> None:
    for length in lengths(name):
        assert sound(chain, name, length).distance <= 1e-9


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("chain", LOSSLESS)
def test_deterministic_drafts_leave_the_target_distribution_unchanged(chain: Chain, name: str) -> None:
    target, _ = languages(name, VOCAB, WIDTH + 1)
    _, drafter = languages("one-hot drafter", VOCAB, WIDTH + 1)
    for length in lengths(name):
        implied = measure(chain, target, drafter, length, deterministic=True)
        assert implied.distance <= 1e-9
    explicit = measure(chain, target, drafter)
    assert implied.accepted == pytest.approx(explicit.accepted, abs=1e-12)


@pytest.mark.parametrize("chain", LOSSLESS)
def test_a_larger_vocabulary_is_no_different(chain: Chain) -> None:
    target, drafter = languages("random", 4, 3)
    assert measure(chain, target, drafter, 2).distance <= 1e-9


@pytest.mark.parametrize("name", LANGUAGES)
def test_block_verification_keeps_at_least_as_many_tokens(name: str) -> None:
    for length in lengths(name):
        token, block = sound(verify_rejection, name, length), sound(verify_block, name, length)
        assert block.accepted >= token.accepted - 1e-12
        if name == "random" and length > 1:
            assert block.accepted > token.accepted + 1e-3


def test_expected_acceptance_is_the_published_formula() -> None:
    """(1 - α^(γ + 1)) / (1 - α) tokens per pass if every position accepts alike, α = Σ min(p, q)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    target, drafter = Language.of(3, WIDTH + 1, lambda _: p), Language.of(3, WIDTH + 1, lambda _: q)
    alpha = float(torch.minimum(p, q).sum())
    expected = (1 - alpha ** (WIDTH + 1)) / (1 - alpha)
    assert measure(verify_rejection, target, drafter).accepted + 1 == pytest.approx(expected, abs=1e-6)


def _keeps_no_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_excess", lambda kept, target, drafted: target.double())


def _forgets_how_likely_the_prefix_was(monkeypatch: pytest.MonkeyPatch) -> None:
    excess = module._excess
    monkeypatch.setattr(module, "_excess", lambda kept, t, d: excess(torch.ones_like(kept), t, d))


def _draws_the_final_token_from_half_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw", lambda probs, u: draw(probs, u / 2))


@pytest.mark.parametrize(
    ("chain", "breakage"),
    [
        (verify_rejection, _keeps_no_residual),
        (verify_rejection, _draws_the_final_token_from_half_its_range),
        (verify_block, _keeps_no_residual),
        (verify_block, _forgets_how_likely_the_prefix_was),
    ],
)
def test_the_exact_law_catches_a_broken_verifier(
    chain: Chain, breakage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = languages("random", VOCAB, WIDTH + 1)
    assert measure(chain, target, drafter).distance <= 1e-9
    breakage(monkeypatch)
    assert measure(chain, target, drafter).distance > 1e-2


@pytest.mark.parametrize("chain", LOSSLESS)
def test_the_exact_law_catches_another_draft_distribution(chain: Chain) -> None:
    """A draft sampled in one precision and tested in another is wrong, by little: the test must see little."""
    target, drafter = languages("random", VOCAB, WIDTH + 1)
    rounded = Language({text: q.bfloat16().double() for text, q in drafter.next.items()}, VOCAB)
    drafted = draw_drafts(drafter, range(-1, WIDTH - 1), replacement=True)
    verify, total = run(chain, drafted, target, rounded)
    assert outcome(verify, drafted, target, total).distance > 1e-5


def test_stopping_at_the_first_failed_test_of_a_block_is_caught() -> None:
    def impatient(draft: Tensor, p: Tensor, q: Tensor | None, u: Tensor) -> Verdict:
        """Block verification, cut where a shorter prefix fails its own test."""
        first = (draft >= 0).sum(1)
        for i in reversed(range(draft.shape[1])):
            alone = u.clone()
            alone[:, 2 + i :] = 1 - 2.0**-53  # longer prefixes fail: is prefix i + 1 kept by itself?
            kept = verify_block(draft, p, q, alone).accepted == i + 1
            first = torch.where(kept | (i >= first), first, i)
        cut = torch.where(torch.arange(draft.shape[1]) < first[:, None], draft, -1)
        lost = first < (draft >= 0).sum(1)
        replaced = u.clone()
        replaced[:, 1:] = torch.where(lost[:, None], 0.0, u[:, 1:])
        return verify_block(cut, p, q, replaced)

    target, drafter = languages("random", VOCAB, WIDTH + 1)
    assert measure(impatient, target, drafter).distance > 1e-3


@pytest.mark.parametrize("chain", LOSSLESS)
def test_single_precision_is_right_to_single_precision(chain: Chain) -> None:
    def single(draft: Tensor, p: Tensor, q: Tensor | None, u: Tensor) -> Verdict:
        return chain(draft, p.float(), None if q is None else q.float(), u)

    for name in ("random", "equal", "nearly equal"):
        target, drafter = languages(name, VOCAB, WIDTH + 1)
        assert measure(single, target, drafter).distance <= 1e-6


def test_greedy_keeps_the_longest_prefix_that_the_target_would_have_chosen() -> None:
    draft = torch.tensor([[5, 6, 7], [5, 9, 7], [9, 6, 7], [5, -1, -1], [-1, -1, -1], [9, -1, -1]])
    best = torch.tensor([[5, 6, 7, 8]] * 6)
    verdict = verify_greedy(draft, best)
    assert verdict.accepted.tolist() == [3, 1, 0, 1, 0, 0]
    assert verdict.bonus.tolist() == [8, 6, 5, 6, 5, 5]
    assert verdict.path.tolist() == [[0, 1, 2], [0, -1, -1], [-1] * 3, [0, -1, -1], [-1] * 3, [-1] * 3]


def test_greedy_is_what_rejection_does_to_a_one_hot_target() -> None:
    generator = torch.Generator().manual_seed(0)
    draft = torch.randint(0, 3, (300, 4), generator=generator)
    best = torch.randint(0, 3, (300, 5), generator=generator)
    p = torch.nn.functional.one_hot(best, 3).double()
    u = torch.rand(300, 5, generator=generator, dtype=torch.double)
    for chain in LOSSLESS:
        assert_same(chain(draft, p, None, u), verify_greedy(draft, best))


def assert_same(a: Verdict, b: Verdict) -> None:
    assert torch.equal(a.accepted, b.accepted)
    assert torch.equal(a.path, b.path)
    assert torch.equal(a.bonus, b.bonus)


def random_batch(rows: int, width: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged drafts drawn from q, p and q with some zeros, uniforms."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(rows, width + 1, vocab, generator=generator, dtype=torch.double) ** 3
    q = p[:, :-1] * torch.rand(rows, width, vocab, generator=generator, dtype=torch.double)
    p[torch.rand(p.shape, generator=generator) < 0.2] = 0
    p, q = (p + 1e-9) / (p + 1e-9).sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    draft = q.flatten(0, 1).multinomial(1, generator=generator).view(rows, width)
    length = torch.randint(0, width + 1, (rows,), generator=generator)
    draft = torch.where(torch.arange(width) < length[:, None], draft, -1)
    return draft, p, q, torch.rand(rows, width + 1, generator=generator, dtype=torch.double)


@pytest.mark.parametrize("chain", LOSSLESS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_sequence_gets_the_same_verdict_alone_and_in_any_batch(chain: Chain, deterministic: bool) -> None:
    draft, p, q, u = random_batch(60, 5, 7)
    batch = chain(draft, p, None if deterministic else q, u)
    assert len(set(batch.accepted.tolist())) >= 3
    for row in range(60):
        length = int((draft[row] >= 0).sum())
        own = slice(row, row + 1)
        alone = chain(
            draft[own, :length], p[own, : length + 1], None if deterministic else q[own, :length], u[own, : length + 1]
        )
        assert alone.accepted == batch.accepted[row]
        assert alone.bonus == batch.bonus[row]
        assert torch.equal(alone.path[0], batch.path[row, :length])


@pytest.mark.parametrize("chain", LOSSLESS)
def test_verdicts_are_the_same_where_no_row_may_be_skipped(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(200, 5, 7)
    skipping = chain(*batch)
    monkeypatch.setattr(module, "rows_worth_visiting", lambda wanted: torch.arange(len(wanted)))
    assert_same(chain(*batch), skipping)


@pytest.mark.parametrize("chain", LOSSLESS)
def test_verification_never_waits_for_the_device(chain: Chain) -> None:
    """Meta tensors have no values, so anything that asks for one raises."""
    draft, p, q, u = (x.to("meta") for x in random_batch(4, 3, 5))
    for drafted in (q, None):
        assert chain(draft, p, drafted, u).path.shape == (4, 3)
    assert verify_greedy(draft, p.argmax(-1)).path.shape == (4, 3)


def _two_tokens(chain: Chain, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected counts of the first two tokens, each row with randomness of its own seed."""
    target, drafter = languages("random", VOCAB, 3)
    seed, step = torch.arange(rows), torch.zeros(rows, dtype=torch.long)
    p_next = torch.stack([target.next[()]] + [target.next[(a,)] for a in range(VOCAB)])  # [1 + V, V]
    q_next = torch.stack([drafter.next[()]] + [drafter.next[(a,)] for a in range(VOCAB)])
    drafting = uniforms(seed, step, 0, 3)
    first = draw(q_next[:1].expand(rows, -1), drafting[:, 0])
    draft = first[:, None]
    p = torch.stack([p_next[0].expand(rows, -1), p_next[1 + first]], dim=1)
    verdict = chain(draft, p, q_next[:1].expand(rows, 1, -1), uniforms(seed, step, 1, 2))
    start = torch.where(verdict.accepted == 1, first, verdict.bonus)
    second = torch.where(verdict.accepted == 1, verdict.bonus, draw(p_next[1 + start], drafting[:, 1]))
    observed = np.bincount((start * VOCAB + second).numpy(), minlength=VOCAB**2)
    return observed, np.array([probability for _, probability in target.joint((), 2)]) * rows


@pytest.mark.parametrize("chain", LOSSLESS)
def test_many_samples_agree_with_the_target(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stats.chisquare(*_two_tokens(chain, 40000)).pvalue > 1e-4
    _keeps_no_residual(monkeypatch)
    assert stats.chisquare(*_two_tokens(chain, 40000)).pvalue < 1e-6
