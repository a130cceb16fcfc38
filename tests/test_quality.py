"""Answer scores: each function against hand-computed cases, a slow definition, or the package it must equal."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.quality import (
    chrf,
    common_prefix,
    contains,
    coverage,
    exact_match,
    has_number,
    numeric_match,
    redundancy,
    rouge_l,
    score,
    similarity,
)
from decoding.questions import Check, Question


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("The answer is 42.", "42"),
        ("First 6 * 7, so x = 42", "42"),
        ("42,000 people", "42000"),
        ("1,234,567.50 in total", "1234567.5"),
        ("12\u202f000", "12,000"),
        ("It costs $34.80.", "34.80"),
        ("It costs $34.8", "34.80"),
        ("about 16.6667 km/h", "16.67"),
        ("-5", "-5"),
        ("x = −5", "-5"),
        ("a loss of -$5", "-5"),
        ("the difference 10-5", "5"),
        ("17/12", "17/12"),
        ("= 1 5/12", "17/12"),
        ("1.42", "17/12"),
        (r"\frac{17}{12}", "17/12"),
        (r"1\frac{5}{12}", "17/12"),
        ("1½ hours", "1.5"),
        ("½", "1/2"),
        ("4/36", "1/9"),
        ("84 / 2", "42"),
        ("25%", "25"),
        ("25 percent", "25%"),
        ("0.25", "25%"),
        ("25 %", "0.25"),
        ("2.5e6", "2500000"),
        (r"2.5 \times 10^{6}", "2500000"),
        ("2.5 × 10⁶", "2,500,000"),
        ("3 × 10^-2", "0.03"),
        ("10⁻²", "0.01"),
        ("2^10", "1024"),
        ("1.2 million people", "1200000"),
        ("The area is 63 cm^2", "63"),
        ("The area is 63 cm²", "63"),
        ("The area is 63 cm2", "63"),
        (r"The area is $63 \text{ cm}^{2}$", "63"),
        (r"So $\boxed{36}$, which took 3 steps.", "36"),
        ("He has 17 - 5 = <<17-5=12>>12 left.\n#### 12", "12"),
        ("It is 12.", "5 + 7 = <<5+7=12>>12\n#### 12"),
        ("**42**", "42"),
        ("答案是42", "42"),
        ("٤٢", "42"),
        (".5", "0.5"),
        ("0." + "3" * 5000, "1/3"),
    ],
)
def test_numbers_match_however_they_are_written(answer: str, reference: str) -> None:
    assert numeric_match(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("41", "42"),
        ("", "42"),
        ("forty-two", "42"),
        ("42 or 43", "42"),
        ("-42", "42"),
        ("42.4", "42"),
        ("16.7", "16.67"),
        ("34.81", "34.80"),
        ("1.4", "17/12"),
        ("0", "1/400"),
        ("0.25%", "25%"),
        ("4200%", "4200000"),
        ("1,23", "123"),
        ("5/0", "5"),
        ("H2O", "2"),
        ("version 1.2.3", "3"),
        ("42", "no number here"),
        ("1" * 5000, "1"),
    ],
)
def test_other_numbers_do_not_match(answer: str, reference: str) -> None:
    assert not numeric_match(answer, reference)


@given(st.text(max_size=60))
def test_any_text_can_be_searched_for_numbers(text: str) -> None:
    assert numeric_match(text, text) == has_number(text)


@given(st.text(alphabet="0123456789.,-−/^{}%e×x* ½²$\\boxed#thousand", max_size=40))
def test_broken_numbers_never_raise(text: str) -> None:
    assert numeric_match(text, text) == has_number(text)


@pytest.mark.parametrize("answer", ["Jupiter", "jupiter.", " **Jupiter**\n", '"Jupiter"', "\uff2aupiter"])
def test_exact_match_ignores_case_spaces_and_decoration(answer: str) -> None:
    assert exact_match(answer, "Jupiter")


@pytest.mark.parametrize("answer", ["", "Saturn", "It is Jupiter.", "Jupiter, Saturn"])
def test_exact_match_wants_nothing_else(answer: str) -> None:
    assert not exact_match(answer, "Jupiter")


def test_exact_match_keeps_signs_that_mean_something() -> None:
    assert not exact_match("C", "C++")
    assert not exact_match("5", "-5")


def test_contains_looks_for_whole_words_in_a_row() -> None:
    assert contains("It was bought by Agnes  Thorne, a widow.", "agnes thorne")
    assert contains("Use `--watch-mode=events`.", "--watch-mode")
    assert not contains("Agnes and Thorne", "Agnes Thorne")
    assert not contains("saltpeter", "salt")
    assert not contains("anything", "...")


def test_rouge_l_of_a_hand_computed_case() -> None:
    # Longest common subsequence "the cat on the mat": 5 words of 6 and 6.
    assert rouge_l("The cat sat on the mat.", "the cat is on the mat") == pytest.approx(5 / 6)
    # "a c": 2 words of 2 and 3, F1 = 2 · 2 / (2 + 3).
    assert rouge_l("a c", "a b c") == pytest.approx(4 / 5)
    assert rouge_l("b a", "a b") == pytest.approx(1 / 2)
    assert rouge_l("", "a") == rouge_l("a", "") == 0.0


def test_rouge_l_sees_words_outside_ascii() -> None:
    assert rouge_l("größer", "GRÖSSER") == 1.0
    assert rouge_l("grüßt", "grämt") == 0.0
    assert rouge_l("我喜欢猫", "我喜欢狗") == pytest.approx(3 / 4)


@given(st.lists(st.sampled_from("abcd"), max_size=25), st.lists(st.sampled_from("abcde"), max_size=25))
def test_rouge_l_equals_the_textbook_table(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    expected = 2 * table[-1][-1] / (len(a) + len(b)) if a and b else 0.0
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_chrf_of_a_hand_computed_case() -> None:
    # Characters: 1 of 2 shared; pairs: 0 of 1. Both averages are 1/4, and so is any F-score of them.
    assert chrf("ab", "ac") == pytest.approx(1 / 4)
    # Precision 1, recall 1/2 for characters; no pairs. F2 = 5 · 1 · 0.5 / (4 · 1 + 0.5).
    assert chrf("a", "ab") == pytest.approx(2.5 / 4.5)
    assert chrf("a b", "ab") == 1.0
    assert chrf("", "a") == chrf("a", "") == chrf("a", "b") == 0.0


def _random_sentences(seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    words = ["The", "river", "runs", "past", "our", "old", "house", "in", "1984", "well-known", "it's", "A", "end."]
    return [
        (" ".join(rng.choices(words, k=rng.randint(0, 15))), " ".join(rng.choices(words, k=rng.randint(1, 15))))
        for _ in range(100)
    ]


def test_rouge_l_equals_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for answer, reference in _random_sentences(0):
        assert rouge_l(answer, reference) == pytest.approx(scorer.score(reference, answer)["rougeL"].fmeasure)


def test_chrf_equals_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    for answer, reference in _random_sentences(1):
        assert 100 * chrf(answer, reference) == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score)


def test_similarity_is_symmetric_and_one_for_the_same_words() -> None:
    assert similarity("Leaves turn red.", "leaves turn RED") == 1.0
    assert similarity("a b c", "c a") == similarity("c a", "a b c") < 1.0
    assert similarity("", "") == 1.0
    assert similarity("", "word") == 0.0


def test_common_prefix_counts_tokens_up_to_the_first_difference() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 3
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], (1, 2, 3)) == 2
    assert common_prefix([5, 2], [1, 2]) == 0
    assert common_prefix([], [1]) == 0


@pytest.mark.parametrize(
    ("check", "answer", "reference", "expected"),
    [
        ("numeric", "so 36 rolls", "36", 1.0),
        ("numeric", "so 35 rolls", "36", 0.0),
        ("exact", "Solid.", "solid", 1.0),
        ("exact", "it is solid", "solid", 0.0),
        ("contains", "it is solid", "solid", 1.0),
        ("contains", "it is liquid", "solid", 0.0),
        ("rouge-l", "a c", "a b c", 0.8),
        ("chrf", "ab", "ac", 0.25),
    ],
)
def test_score_uses_the_check_of_the_question(check: Check, answer: str, reference: str, expected: float) -> None:
    question = Question("1", "any", ("?",), (reference,), check)
    assert score(question, answer) == pytest.approx(expected)


def test_score_takes_the_best_of_several_references() -> None:
    question = Question("1", "qa", ("Who?",), ("her sister", "Clara"), "contains")
    assert score(question, "Clara") == 1.0


def test_score_compares_each_turn_with_its_own_reference() -> None:
    question = Question("1", "math", ("?", "And then?", "Why?"), ("13", "26"), "numeric")
    assert score(question, "13") == 1.0
    assert score(question, "13", turn=1) == 0.0
    assert score(question, "26", turn=1) == 1.0
    assert score(question, "because", turn=2) is None


def test_nothing_is_scored_without_check_or_reference() -> None:
    assert score(Question("1", "writing", ("?",)), "text") is None
    assert score(Question("1", "writing", ("?",), ("text",)), "text") is None
    assert score(Question("1", "qa", ("?",), ("",), "contains"), "text") is None


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], 0.0),
        (["one two three four"], 0.0),
        (["one two three", "four five six"], 0.0),
        (["one two three four", "One, two, THREE: four!"], 1.0),
        (["one two three four", "one two three five"], 0.5),
        (["a b c", "d e f", "a b c d e f"], 0.4),  # def; abc, bcd, cde, def: two of five
        (["one two", "one two"], 0.0),  # too short to say
    ],
)
def test_redundancy_counts_what_stood_in_an_earlier_point(points: list[str], expected: float) -> None:
    assert redundancy(points) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("How can I improve my time management?", "Managing time improves with practice.", 2 / 3),
        ("How can I improve my time management?", "Eat an apple.", 0.0),
        ("What are you?", "Nothing.", 1.0),
        ("Name 7 rivers", "Rivers: Nile", 0.5),
        ("日本の首都", "首都は東京", 2 / 5),
    ],
)
def test_coverage_is_about_the_questions_content_words(question: str, answer: str, expected: float) -> None:
    assert coverage(question, answer) == pytest.approx(expected)
