"""Commit policies of masked refinement: after each pass over a block, which places to write, and which to revise.

A policy is a pure function of what the pass said (`BlockView`); it keeps nothing between passes, so one object serves
all sequences. Every policy writes at least one open place per pass, so a block of n places takes at most n passes, and
as many more as a revising policy allows itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from decoding.errors import InvalidRequest, UnknownName
from decoding.textform import TextForm, build, is_count, parse_call

REGISTRY: dict[str, type[Policy]] = {}


@dataclass(frozen=True)
class BlockView:
    """One block after a pass; every array is [places] but for `divergence`, [passes, places].

    tokens: before the pass, masks included. masked: which of them are masks. open: which masks may be written.
    predicted: what the model puts there now, drawn if the request samples; the mask itself is never predicted.
    confidence: the model's probability of that, before temperature and filters.
    trust: of visible places, the confidence they were written with.
    margin: probability of the best token minus the second best's. entropy: nats. divergence: of each pass over the
    block, this one last, the KL divergence in nats of the distribution before from its own, infinite in the first. Only
    what the policy `needs` is computed; the rest is empty.
    passes: earlier passes over this block. full: how many of them found no mask.
    last: the block after the last pass's writing, before anything was masked again; None in the first pass.
    """

    tokens: np.ndarray
    masked: np.ndarray
    open: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    trust: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray
    divergence: np.ndarray
    passes: int = 0
    full: int = 0
    last: np.ndarray | None = None


@dataclass(frozen=True)
class Change:
    """write: [places] which take what was predicted; visible ones are revised by that. clear: [places] which are masked
    again, after that. done: whether the block may be committed once it holds no mask."""

    write: np.ndarray
    clear: np.ndarray
    done: bool = True


class Policy(TextForm, ABC):
    """Base of all policies: frozen dataclasses with a text form, found by `name`.

    needs: the costlier fields of `BlockView` it looks at: "margin", "entropy", "divergence".
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            REGISTRY[cls.name] = cls

    @abstractmethod
    def change(self, view: BlockView) -> Change:
        """What to do with the block."""


class WritingPolicy(Policy):
    """A policy that only ever writes masked places."""

    @abstractmethod
    def wanted(self, view: BlockView) -> tuple[np.ndarray, np.ndarray]:
        """([places] bool, [places] score): what to write, masks or not, and what to prefer if nothing of it is open."""

    def change(self, view: BlockView) -> Change:
        write, score = self.wanted(view)
        write = write & view.open
        if view.open.any() and not write.any():
            write[np.where(view.open, score, -np.inf).argmax()] = True
        return Change(write, np.zeros_like(write))


def find(text: str) -> Policy:
    """A policy from its text form.

    Raises UnknownName with the nearest names, InvalidRequest for options that do not fit.
    """
    name, options = parse_call(text)
    if name not in REGISTRY:
        raise UnknownName("commit policy", name, REGISTRY)
    policy = build(REGISTRY[name], name, options)
    assert isinstance(policy, Policy)
    return policy


def resolve(policy: Policy | str) -> Policy:
    """A policy from its text form; a policy stays as it is."""
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise InvalidRequest(f"a policy is a name such as 'confidence(threshold=0.9)', not {policy!r}.")
    return find(policy)


def _first(order: np.ndarray, count: int) -> np.ndarray:
    """[places] the first `count` of an order of places."""
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def _ranked(score: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Places in descending order of score, those outside `among` last; ties from left to right."""
    return np.argsort(-np.where(among, score, -np.inf), kind="stable")


def _check_share(option: str, value: object, *, least: float = 0.0, most: float = 1.0) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequest(f"{option} must be a number from {least:g} to {most:g}, not {value!r}.")


def _check_count(option: str, value: object, least: int = 1) -> None:
    if not is_count(value, least):
        raise InvalidRequest(f"{option} must be an integer of at least {least}, not {value!r}.")


@dataclass(frozen=True)
class Fixed(WritingPolicy):
    """The `count` most confident places in every pass (LLaDA, Nie et al. 2025: low-confidence remasking); 1 is the
    slow, careful extreme that others are measured against."""

    count: int = 1

    name: ClassVar[str] = "fixed"
    summary: ClassVar[str] = "so many tokens per pass, the most confident ones"

    def __post_init__(self) -> None:
        _check_count("count", self.count)

    def wanted(self, view: BlockView) -> tuple[np.ndarray, np.ndarray]:
        return _first(_ranked(view.confidence, view.open), self.count), view.confidence


@dataclass(frozen=True)
class Confidence(WritingPolicy):
    """Every place whose confidence reaches a threshold (Fast-dLLM, Wu et al. 2025)."""

    threshold: float = 0.9

    name: ClassVar[str] = "confidence"
    summary: ClassVar[str] = "all tokens whose probability reaches a threshold"

    def __post_init__(self) -> None:
        _check_share("threshold", self.threshold)

    def wanted(self, view: BlockView) -> tuple[np.ndarray, np.ndarray]:
        return view.confidence >= self.threshold, view.confidence


@dataclass(frozen=True)
class Factor(WritingPolicy):
    """The n most confident places for the largest n with (n + 1) · (1 - the nth confidence) < factor (Fast-dLLM): the
    more are written together, the surer each must be."""

    factor: float = 1.0

    name: ClassVar[str] = "factor"
    summary: ClassVar[str] = "as many tokens as their confidences allow to be written together"

    def __post_init__(self) -> None:
        _check_share("factor", self.factor, most=1e6)

    def wanted(self, view: BlockView) -> tuple[np.ndarray, np.ndarray]:
        order = _ranked(view.confidence, view.open)[: int(view.open.sum())]
        fits = (np.arange(len(order)) + 2) * (1 - view.confidence[order]) < self.factor
        most = int(fits.nonzero()[0].max()) + 1 if fits.any() else 0
        return np.isin(np.arange(len(view.tokens)), order[:most]), view.confidence


@dataclass(frozen=True)
class EntropyBound(WritingPolicy):
    """Places in order of entropy for as long as their sum without the largest stays within a bound: a bound, in nats,
    on what the tokens can still say about each other (EB-Sampler, Ben-Hamu et al. 2025)."""

    bound: float = 0.1

    name: ClassVar[str] = "entropy"
    summary: ClassVar[str] = "as many tokens as a bound on their joint uncertainty allows"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        _check_share("bound", self.bound, most=1e6)

    def wanted(self, view: BlockView) -> tuple[np.ndarray, np.ndarray]:
        order = _ranked(-view.entropy, view.open)[: int(view.open.sum())]
        sums = view.entropy[order].cumsum()  # ascending, so the largest so far is the last
        count = int((sums - view.entropy[order] <= self.bound).sum())
        return np.isin(np.arange(len(view.tokens)), order[:count]), -view.entropy


@dataclass(frozen=True)
class Margin(WritingPolicy):
    """Every place whose best token is that much likelier than the second best (Kim et al. 2025)."""

    threshold: float = 0.8

    name: ClassVar[str] = "margin"
    summary: ClassVar[str] = "all tokens that lead the second best by a threshold"
    needs: ClassVar[frozenset[str]] = frozenset({"margin"})

    def __post_init__(self) -> None:
        _check_share("threshold", self.threshold)

    def wanted(self, view: BlockView) -> tuple[np.ndarray, np.ndarray]:
        return view.margin >= self.threshold, view.margin


@dataclass(frozen=True)
class Klass(WritingPolicy):
    """Every place that is confident and whose distribution has hardly moved in any of the last `history` passes (KLASS,
    Kim et al. 2025)."""

    confidence: float = 0.9
    divergence: float = 0.01
    history: int = 1

    name: ClassVar[str] = "klass"
    summary: ClassVar[str] = "all tokens that are confident and stable between passes"
    needs: ClassVar[frozenset[str]] = frozenset({"divergence"})

    def __post_init__(self) -> None:
        _check_share("confidence", self.confidence)
        _check_share("divergence", self.divergence, most=1e6)
        _check_count("history", self.history)

    def wanted(self, view: BlockView) -> tuple[np.ndarray, np.ndarray]:
        # The first pass diverges infinitely, so that nothing is steady before there are `history` others.
        steady = (view.divergence[-self.history :] < self.divergence).all(axis=0)
        return (view.confidence > self.confidence) & steady, view.confidence


class _Revising(Policy):
    """A policy that writes as another one, `base`, does, and then revises."""

    base: Policy | str

    def _take_base(self) -> None:
        base = resolve(self.base)
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "needs", base.needs)

    def _written(self, view: BlockView) -> Change:
        assert isinstance(self.base, Policy)
        return self.base.change(view)


@dataclass(frozen=True)
class Remask(_Revising):
    """In each of a block's first `passes` passes, the least trusted `share` of its visible tokens are masked again
    (ReMDM, Wang et al. 2025, with the least confident ones in place of a draw by confidence)."""

    base: Policy | str = Confidence()
    share: float = 0.2
    passes: int = 3

    name: ClassVar[str] = "remask"
    summary: ClassVar[str] = "write as `base` does, and mask the least trusted tokens again in the first passes"

    def __post_init__(self) -> None:
        self._take_base()
        _check_share("share", self.share)
        _check_count("passes", self.passes)

    def change(self, view: BlockView) -> Change:
        change = self._written(view)
        visible = ~view.masked | change.write
        trust = np.where(change.write, view.confidence, view.trust)
        count = int(self.share * visible.sum()) if view.passes < self.passes else 0
        clear = _first(_ranked(-trust, visible), count) | change.clear
        return Change(change.write, clear, change.done and not clear.any())


@dataclass(frozen=True)
class Edit(_Revising):
    """Visible tokens are replaced when the model now puts another one there with at least this confidence (as LLaDA 2.1
    does).

    extra: passes over a block that holds no mask any more, until one of them changes nothing.
    """

    base: Policy | str = Confidence()
    threshold: float = 0.9
    extra: int = 1

    name: ClassVar[str] = "edit"
    summary: ClassVar[str] = "write as `base` does, and replace visible tokens that the model has come to doubt"

    def __post_init__(self) -> None:
        self._take_base()
        _check_share("threshold", self.threshold)
        _check_count("extra", self.extra, least=0)

    def change(self, view: BlockView) -> Change:
        change = self._written(view)
        edits = ~view.masked & (view.predicted != view.tokens) & (view.confidence >= self.threshold)
        checked = not view.masked.any() and not edits.any()
        done = checked or view.full + (not view.masked.any()) >= self.extra
        return Change(change.write | edits, change.clear, change.done and done)


@dataclass(frozen=True)
class Iterations(Policy):
    """Mask-Predict (Ghazvininejad et al. 2019): every pass writes all masks, then the ⌊n · (1 - t/T)⌋ least trusted of
    the n places are masked again, at least one, until pass T, or until two passes in a row end alike."""

    count: int = 4

    name: ClassVar[str] = "iterations"
    summary: ClassVar[str] = "write everything, mask the least trusted again, fewer in each of a number of passes"

    def __post_init__(self) -> None:
        _check_count("count", self.count)

    def change(self, view: BlockView) -> Change:
        none = np.zeros_like(view.masked)
        written = np.where(view.open, view.predicted, view.tokens)
        if view.passes + 1 >= self.count or (view.last is not None and (written == view.last).all()):
            return Change(view.open, none)
        trust = np.where(view.open, view.confidence, view.trust)
        count = max(1, int(len(trust) * (1 - (view.passes + 1) / self.count)))
        return Change(view.open, _first(_ranked(-trust, ~view.masked | view.open), count), done=False)
