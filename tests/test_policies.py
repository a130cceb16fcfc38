"""Commit policies as pure functions: what they write, what they revise, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from decoding.errors import InvalidRequest, UnknownName
from decoding.strategies.policies import REGISTRY, BlockView, Policy, find, resolve

MASK = -1


def view(
    confidence: list[float],
    *,
    visible: dict[int, int] | None = None,
    trust: dict[int, float] | None = None,
    **more: object,
) -> BlockView:
    """A block of masks, but for the `visible` places, in which token 10 + i is predicted for place i."""
    size = len(confidence)
    tokens = np.full(size, MASK)
    for place, token in (visible or {}).items():
        tokens[place] = token
    masked = tokens == MASK
    fields: dict[str, Any] = {
        "tokens": tokens,
        "masked": masked,
        "open": masked,
        "predicted": 10 + np.arange(size),
        "confidence": np.array(confidence),
        "trust": np.array([(trust or {}).get(place, 1.0) for place in range(size)]),
        "margin": np.array(confidence) - 0.1,
        "entropy": 1 - np.array(confidence),
        "divergence": np.full((1, size), np.inf),
    }
    return BlockView(**{**fields, **more})


def written(policy: str, given: BlockView) -> list[int]:
    """The places that a policy writes; it must not revise any."""
    change = find(policy).change(given)
    assert not change.clear.any() and not (change.write & ~given.open).any() and change.done
    return change.write.nonzero()[0].tolist()


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_policy_has_a_text_form_a_summary_and_writes_something(name: str) -> None:
    policy = find(name)
    assert find(str(policy)) == policy and hash(find(str(policy))) == hash(policy) and REGISTRY[name].summary
    assert resolve(policy) is policy
    for size in range(1, 6):
        for unsure in (0.0, 0.3, 1.0):
            given = view([unsure] * size, visible={0: 99} if size > 1 else {})
            change = policy.change(given)
            assert (change.write & given.masked).any()


def test_fixed_writes_the_most_confident_from_left_to_right() -> None:
    assert written("fixed", view([0.2, 0.9, 0.9, 0.1])) == [1]
    assert written("fixed(count=3)", view([0.2, 0.9, 0.9, 0.1])) == [0, 1, 2]
    assert written("fixed(count=3)", view([0.2, 0.9, 0.9, 0.1], visible={1: 5, 2: 5})) == [0, 3]


def test_confidence_and_margin_write_what_reaches_the_threshold_or_else_the_best() -> None:
    assert written("confidence(threshold=0.5)", view([0.5, 0.4, 0.8])) == [0, 2]
    assert written("confidence(threshold=0.9)", view([0.5, 0.4, 0.8])) == [2]
    assert written("confidence", view([0.5, 0.99, 0.8], visible={1: 7})) == [2]
    assert written("margin(threshold=0.4)", view([0.5, 0.4, 0.8])) == [0, 2]
    assert written("margin", view([0.5, 0.4, 0.8], margin=np.array([0.3, 0.2, 0.1]))) == [0]


def test_factor_is_the_largest_set_its_rule_allows() -> None:
    confidences = [0.99, 0.7, 0.9, 0.85, 0.2]
    for factor in (0.01, 0.1, 0.35, 0.5, 0.9, 1.3, 10.0):
        ranked = sorted(confidences, reverse=True)
        fits = [n for n in range(1, 6) if (n + 1) * (1 - ranked[n - 1]) < factor]
        assert len(written(f"factor(factor={factor})", view(confidences))) == max(fits, default=1)


def test_the_entropy_bound_is_never_exceeded_and_never_wasted() -> None:
    entropy = np.array([0.05, 0.3, 0.02, 0.6, 0.04])
    for bound in (0.0, 0.03, 0.07, 0.11, 0.12, 0.5, 5.0):
        chosen = written(f"entropy(bound={bound})", view([0.5] * 5, entropy=entropy))
        fitting = [
            size for size in range(1, 6) for places in combinations(range(5), size)
            if entropy[list(places)].sum() - entropy[list(places)].max() <= bound
        ]  # fmt: skip
        assert len(chosen) == max(fitting)
        assert entropy[chosen].sum() - entropy[chosen].max() <= bound + 1e-12


def test_klass_waits_until_distributions_stand_still() -> None:
    assert written("klass", view([0.95, 0.99, 0.97])) == [1]  # first pass: nothing is known to be stable
    moved = np.array([[np.inf, np.inf, np.inf], [0.001, 0.5, 0.002]])
    assert written("klass", view([0.95, 0.99, 0.5], divergence=moved)) == [0]
    assert written("klass(confidence=0.4)", view([0.95, 0.99, 0.5], divergence=moved)) == [0, 2]
    assert written("klass(confidence=0.4, history=2)", view([0.95, 0.99, 0.5], divergence=moved)) == [1]
    longer = np.concatenate([moved, [[0.002, 0.001, 0.3]]])
    assert written("klass(confidence=0.4, history=2)", view([0.95, 0.99, 0.5], divergence=longer)) == [0]
    assert written("klass(confidence=0.4)", view([0.95, 0.99, 0.5], divergence=longer)) == [0, 1]


def test_places_that_are_not_open_stay_masks() -> None:
    closed = np.array([False, True, True])
    for name in REGISTRY:
        if name != "iterations":
            change = find(name).change(view([0.99, 0.2, 0.1], open=closed))
            assert not change.write[0]


def test_remask_takes_back_the_least_trusted_in_the_first_passes_only() -> None:
    given = view([0.5, 0.95, 0.2, 0.2], visible={0: 5}, trust={0: 0.3})
    change = find("remask(share=0.5, passes=2)").change(given)
    assert change.write.nonzero()[0].tolist() == [1]
    assert change.clear.nonzero()[0].tolist() == [0] and not change.done
    later = find("remask(share=0.5, passes=2)").change(replace(given, passes=2))
    assert not later.clear.any() and later.done


def test_edit_replaces_what_the_model_has_come_to_doubt() -> None:
    given = view([0.95, 0.95, 0.8, 0.3], visible={0: 77, 1: 11, 2: 77})
    change = find("edit(threshold=0.9)").change(given)
    assert change.write.nonzero()[0].tolist() == [0, 3]  # place 1 agrees, place 2 is doubted too little
    assert not change.done
    full = view([0.95, 0.95], visible={0: 10, 1: 11}, full=0)
    assert find("edit").change(full).done  # looked at again, and nothing to change
    doubted = view([0.95, 0.95], visible={0: 10, 1: 12})
    assert find("edit(extra=1)").change(doubted).done and not find("edit(extra=2)").change(doubted).done
    assert find("edit(extra=2)").change(replace(doubted, full=1)).done


def test_iterations_masks_fewer_in_every_pass_and_stops_when_two_agree() -> None:
    policy = find("iterations(count=4)")
    first = policy.change(view([0.9, 0.1, 0.5, 0.3, 0.8, 0.7, 0.6, 0.4]))
    assert first.write.all() and not first.done
    assert first.clear.nonzero()[0].tolist() == [1, 2, 3, 5, 6, 7]
    second = replace(view([0.9] * 8, visible=dict.fromkeys((0, 4, 5), 5)), passes=1)
    assert second.masked.sum() == 5 and find("iterations(count=4)").change(second).clear.sum() == 4
    settled = policy.change(replace(second, last=np.where(second.masked, second.predicted, second.tokens)))
    assert settled.done and not settled.clear.any()
    assert policy.change(replace(second, passes=3)).done


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("confidence(threshold=1.5)", "threshold must be a number from 0 to 1, not 1.5"),
        ("confidence(threshold=high)", "threshold must be a number"),
        ("fixed(count=0)", "count must be an integer of at least 1"),
        ("fixed(count=true)", "count must be an integer"),
        ("factor(factor=-1)", "factor must be a number"),
        ("entropy(bound=-0.1)", "bound must be a number"),
        ("margin(threshold=2)", "threshold must be a number"),
        ("klass(divergence=-1)", "divergence must be a number"),
        ("klass(history=0)", "history must be an integer of at least 1"),
        ("remask(share=1.2)", "share must be a number"),
        ("remask(base=remsk)", "did you mean 'remask'"),
        ("edit(extra=-1)", "extra must be an integer of at least 0"),
        ("iterations(count=none)", "count must be an integer"),
        ("confidnce", "did you mean 'confidence'"),
        ("confidence(treshold=0.5)", "did you mean 'threshold'"),
    ],
)
def test_bad_policies_get_one_sentence(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        find(text)
    assert "\n" not in str(caught.value)


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="a policy is a name"):
        resolve(3)  # type: ignore[arg-type]
    assert issubclass(UnknownName, InvalidRequest) and issubclass(REGISTRY["fixed"], Policy)
