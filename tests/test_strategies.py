"""Strategies as values: their text form, and what is refused."""

from __future__ import annotations

import pytest

import decoding
from decoding import drafting
from decoding.errors import InvalidRequest, UnknownName
from decoding.strategies import REGISTRY, Autoregressive, Jacobi, SkeletonOfThought, Speculative, parse
from drafters import PromptLookup

VALUES = [
    Autoregressive(),
    Jacobi(),
    Jacobi(block_size=16),
    Speculative(),
    Speculative(drafter="prompt-lookup(max_ngram=4)", draft_length=7),
    Speculative(drafter="draft-model(model=some/where-1.5b)"),
    Speculative(drafter="draft-model(model='a folder, with a comma')"),
    SkeletonOfThought(),
    SkeletonOfThought(inner=Speculative(drafter="prompt-lookup(max_ngram=4)"), max_points=5),
]


@pytest.mark.parametrize("strategy", VALUES, ids=str)
def test_text_form_parses_back(strategy: decoding.Strategy) -> None:
    assert parse(str(strategy)) == strategy
    assert hash(parse(str(strategy))) == hash(strategy)


def test_text_form_names_only_what_differs_from_the_default() -> None:
    assert str(Jacobi()) == "jacobi"
    assert str(Jacobi(block_size=6)) == "jacobi(block_size=6)"
    nested = SkeletonOfThought(inner=Speculative(draft_length=3))
    assert str(nested) == "skeleton(inner=speculative(draft_length=3))"


def test_a_drafter_object_stands_in_for_its_name() -> None:
    drafter = PromptLookup(max_ngram=5)
    assert str(Speculative(drafter=drafter)) == "speculative(drafter=prompt-lookup(max_ngram=5))"
    assert Speculative(drafter=drafter) == Speculative(drafter=drafter)


@pytest.mark.parametrize("folder", ["2024", "007", "1e5", "true", "'none'"])
def test_a_folder_may_be_named_like_a_number(folder: str) -> None:
    named = folder.strip("'")
    assert vars(drafting.find(f"eagle3(head={folder})"))["head"] == named
    assert vars(drafting.find(f"draft-model(model={folder})"))["model"] == named
    strategy = Jacobi(adapter=named)
    assert parse(f"jacobi(adapter={folder})") == strategy == parse(str(strategy))
    assert parse("jacobi(adapter=none)") == Jacobi()


@pytest.mark.parametrize("drafter", [5, None, PromptLookup])
def test_what_is_no_drafter_is_refused(drafter: object) -> None:
    with pytest.raises(InvalidRequest, match="drafter must be"):
        Speculative(drafter=drafter)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speculativ", "did you mean 'speculative'"),
        ("jacobi(blocksize=3)", "did you mean 'block_size'"),
        ("speculative(drafter=promt-lookup)", "did you mean 'prompt-lookup'"),
        ("speculative(drafter=prompt-lookup(max_gram=3))", "did you mean 'max_ngram'"),
        ("jacobi(block_size=1)", "at least 2"),
        ("jacobi(block_size=big)", "at least 2"),
        ("jacobi(block_size)", "option=value"),
        ("jacobi(block_size=3", "name or name"),
        ("skeleton(inner=skeleton)", "token-level"),
        ("skeleton(inner=speculative(drafter=prompt-lookup)", "do not match"),
        ("", "name or name"),
        ("speculative(draft_length=0)", "at least 1"),
        ("speculative(drafter=5)", "unknown drafter '5'"),
        ("speculative(drafter=none)", "unknown drafter 'none'"),
        ("speculative(verifier=lucky)", "did you mean|known:"),
    ],
)
def test_bad_text_gets_one_sentence(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_every_strategy_is_registered_under_its_name_and_says_what_it_is() -> None:
    assert set(REGISTRY) >= {"autoregressive", "speculative", "jacobi", "skeleton"}
    for name, strategy in REGISTRY.items():
        assert strategy.name == name and strategy.summary


def test_unknown_names_are_invalid_requests() -> None:
    assert issubclass(UnknownName, InvalidRequest) and issubclass(InvalidRequest, ValueError)
