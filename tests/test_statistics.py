"""Statistics: intervals that cover, agree with SciPy's, and know when they do not exist."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from scipy import stats

from decoding.report import statistics
from decoding.report.runfile import Run
from decoding.report.statistics import (
    Interval,
    bootstrap,
    drift,
    geometric_mean_ratio,
    holm,
    mean,
    minimum_detectable_ratio,
    outliers,
    ratio_of_rates,
    ratio_of_sums,
    sign_flip_p,
)
from decoding.report.summary import per_question_seconds, summarize
from tests.synthetic_run import synthetic_run


def times(n: int, seed: int, speedup: float = 1.5, scatter: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of plain decoding and of a strategy on n questions of very different length."""
    rng = np.random.default_rng(seed)
    plain = rng.lognormal(1.0, 0.7, n)
    return plain, plain / speedup * rng.lognormal(-(scatter**2) / 2, scatter, n)


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("statistic", [ratio_of_sums, geometric_mean_ratio])
def test_intervals_agree_with_scipy(statistic: statistics.Statistic, method: Literal["bca", "percentile"]) -> None:
    plain, fast = times(25, 3, scatter=0.5)
    ours = bootstrap(statistic, plain, fast, method=method, resamples=20000, seed=1)
    theirs = stats.bootstrap(
        (plain, fast),
        lambda a, b, axis: statistic(a, b),
        paired=True,
        vectorized=True,
        method="BCa" if method == "bca" else "percentile",
        n_resamples=20000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_bca_differs_from_percentiles_where_the_data_are_skewed() -> None:
    plain, fast = times(15, 4, scatter=1.0)
    bca = bootstrap(ratio_of_sums, plain, fast, method="bca")
    percentile = bootstrap(ratio_of_sums, plain, fast, method="percentile")
    assert bca.estimate == percentile.estimate
    assert abs(bca.high - percentile.high) > 0.02 * (percentile.high - percentile.low)


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize(
    ("statistic", "truth"), [(ratio_of_sums, 1.5), (geometric_mean_ratio, 1.5 * math.exp(0.4**2 / 2))]
)
def test_intervals_cover_the_truth_as_often_as_they_say(
    statistic: statistics.Statistic, truth: float, method: Literal["bca", "percentile"]
) -> None:
    runs = 300
    covered = sum(
        bootstrap(statistic, *times(40, 1000 + i, scatter=0.4), method=method, resamples=599, seed=i).contains(truth)
        for i in range(runs)
    )
    # At n = 40 the bootstrap is a few points short of its 95 %; five standard errors below 93 % would be a mistake.
    assert 0.87 <= covered / runs <= 0.985


def test_pairing_is_what_makes_intervals_narrow() -> None:
    plain, fast = times(40, 5, scatter=0.1)
    paired = bootstrap(ratio_of_sums, plain, fast)
    unpaired = bootstrap(ratio_of_sums, plain, np.random.default_rng(0).permutation(fast))
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


@pytest.mark.parametrize("questions", [1, 2, statistics.FEWEST - 1])
def test_few_questions_have_an_estimate_and_no_interval(questions: int) -> None:
    found = bootstrap(ratio_of_sums, *times(questions, 2))
    assert found.estimate > 0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.contains(found.estimate)
    assert math.isfinite(bootstrap(ratio_of_sums, *times(statistics.FEWEST, 2)).low)


def test_no_question_has_nothing() -> None:
    assert math.isnan(bootstrap(ratio_of_sums, [], []).estimate)


@pytest.mark.parametrize("statistic", [ratio_of_sums, geometric_mean_ratio])
@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_equal_questions_have_an_interval_of_no_width(
    statistic: statistics.Statistic, method: Literal["bca", "percentile"]
) -> None:
    found = bootstrap(statistic, [3.0] * 10, [2.0] * 10, method=method)
    assert found.low == found.high == found.estimate == pytest.approx(1.5)


def test_a_constant_ratio_has_no_width_however_different_the_questions() -> None:
    found = bootstrap(ratio_of_sums, [3.0, 6.0, 30.0, 9.0, 12.0], [2.0, 4.0, 20.0, 6.0, 8.0])
    assert found.low == found.high == pytest.approx(1.5)


def test_zero_time_gives_no_number_and_no_warning() -> None:
    with np.errstate(all="raise"):
        assert math.isnan(bootstrap(ratio_of_sums, [1.0, 2.0], [0.0, 0.0]).estimate)
    assert math.isnan(bootstrap(geometric_mean_ratio, [1.0, 2.0], [1.0, 0.0]).estimate)
    assert math.isnan(bootstrap(geometric_mean_ratio, [0.0, 2.0], [1.0, 1.0]).estimate)
    some = bootstrap(
        ratio_of_sums, [1.0, 1.0, 1.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0]
    )  # some resamples have no time at all
    assert some.estimate == 4.5
    assert math.isnan(some.low)


def test_columns_of_different_length_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="one length"):
        bootstrap(ratio_of_sums, [1.0, 2.0], [1.0])


def test_equal_seeds_give_equal_intervals() -> None:
    plain, fast = times(20, 6)
    assert bootstrap(ratio_of_sums, plain, fast, seed=1) == bootstrap(ratio_of_sums, plain, fast, seed=1)
    assert bootstrap(ratio_of_sums, plain, fast, seed=1) != bootstrap(ratio_of_sums, plain, fast, seed=2)


def test_more_questions_than_a_block_holds_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = times(30, 7)
    whole = bootstrap(ratio_of_sums, plain, fast)
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    split = bootstrap(ratio_of_sums, plain, fast)
    assert split.low == pytest.approx(whole.low, rel=0.01)
    assert split.high == pytest.approx(whole.high, rel=0.01)


def test_the_two_ratios_weigh_questions_differently() -> None:
    plain, fast = np.array([1.0, 100.0]), np.array([1.0, 50.0])
    assert ratio_of_sums(plain, fast) == pytest.approx(101 / 51)
    assert geometric_mean_ratio(plain, fast) == pytest.approx(math.sqrt(2))
    assert geometric_mean_ratio(fast, plain) == pytest.approx(1 / math.sqrt(2))
    assert mean(np.array([1.0, 3.0])) == 2.0


def test_the_ratio_per_token_takes_out_the_length_of_answers() -> None:
    seconds, tokens = np.array([1.0, 3.0]), np.array([10.0, 30.0])
    assert ratio_of_rates(seconds, tokens, 2 * seconds, 2 * tokens) == pytest.approx(1.0)
    assert ratio_of_rates(seconds, tokens, seconds / 2, tokens) == pytest.approx(2.0)
    assert math.isnan(float(ratio_of_rates(seconds, tokens, seconds, 0 * tokens)))


def test_the_sign_flip_test_equals_scipys_where_it_is_exact() -> None:
    differences = np.random.default_rng(8).normal(0.3, 1.0, 10)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(differences) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_the_sign_flip_test_finds_a_difference_and_only_that() -> None:
    rng = np.random.default_rng(9)
    assert sign_flip_p(rng.normal(0.2, 0.1, 40)) < 0.001
    alarms = sum(sign_flip_p(rng.normal(0.0, 0.1, 20), resamples=199) < 0.05 for _ in range(200))
    assert alarms <= 22  # 10 expected; more than 22 has a chance of 0.0002
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0
    assert math.isnan(sign_flip_p([]))
    assert math.isnan(sign_flip_p([0.1, math.inf]))


def test_holm_equals_the_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_leaves_out_tests_that_were_not_made() -> None:
    first, missing, second = holm([0.02, math.nan, 0.01])
    assert (first, second) == (0.02, 0.02)
    assert math.isnan(missing)


def test_the_detectable_speedup_is_detected_four_times_of_five() -> None:
    rng = np.random.default_rng(10)
    n, scatter = 20, 0.25
    effect = math.log(float(np.median([minimum_detectable_ratio(rng.normal(0.1, scatter, n)) for _ in range(400)])))
    found = np.mean([stats.ttest_1samp(rng.normal(effect, scatter, n), 0).pvalue < 0.05 for _ in range(1500)])
    assert 0.74 <= found <= 0.86


def test_more_questions_detect_less() -> None:
    few, many = np.tile([0.1, 0.3], 5), np.tile([0.1, 0.3], 50)
    assert 1 < minimum_detectable_ratio(many) < minimum_detectable_ratio(few)
    assert math.isnan(minimum_detectable_ratio([0.1]))


def noisy(n: int, slope: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    started = np.sort(rng.uniform(0, 600, n))
    return started, 0.03 * (1 + slope * started / 600) * rng.normal(1, 0.02, n)


def test_drift_is_found_and_measured() -> None:
    found = drift(*noisy(40, 0.2, 11))
    assert found.flagged
    assert found.change == pytest.approx(0.2, abs=0.04)
    assert drift(*noisy(40, -0.2, 11)).change < -0.1


def test_a_steady_machine_is_not_accused() -> None:
    assert not any(drift(*noisy(40, 0.0, seed)).flagged for seed in range(50))
    assert not any(outliers(noisy(40, 0.0, seed)[1]) for seed in range(50))


def test_a_few_outliers_are_no_drift_and_drift_is_no_outlier() -> None:
    started, seconds = noisy(40, 0.0, 12)
    seconds[[30, 35, 38]] *= 3
    assert not drift(started, seconds).flagged
    assert outliers(seconds) == [30, 35, 38]
    assert outliers(noisy(40, 0.2, 12)[1]) == []


def test_questions_of_different_cost_are_no_drift_when_repeated() -> None:
    rng = np.random.default_rng(13)
    cost = np.sort(rng.uniform(0.02, 0.06, 20))  # the expensive questions come last
    seconds = np.concatenate([cost, cost]) * rng.normal(1, 0.01, 40)
    questions = [*range(20), *range(20)]
    assert not drift(np.arange(40.0), seconds, questions).flagged
    assert outliers(seconds, questions) == []
    assert drift(np.arange(40.0), seconds * np.linspace(1, 1.3, 40), questions).flagged


def test_repeats_that_follow_each_other_do_not_hide_drift() -> None:
    seconds = np.repeat(np.linspace(0.03, 0.04, 20), 2) * np.random.default_rng(14).normal(1, 0.01, 40)
    assert drift(np.arange(40.0), seconds, list(np.repeat(np.arange(20), 2))).flagged


def test_too_few_answers_say_nothing_of_drift() -> None:
    assert not drift([0, 1, 2], [1, 2, 3]).flagged
    assert outliers([1, 1, 1, 100]) == []
    assert not drift(np.zeros(10), np.arange(1.0, 11)).flagged


def test_an_interval_knows_what_it_contains() -> None:
    assert Interval(1.0, 0.9, 1.1).contains(1.05)
    assert not Interval(1.0, 0.9, 1.1).contains(1.2)


def test_categories_have_their_own_figures_corrected_for_their_number() -> None:
    run = synthetic_run(24, tokens=(10, 20))
    summary = summarize(run, resamples=199)
    cells = [(row.strategy, name, cell) for row in summary.strategies for name, cell in row.categories.items()]
    tested = [(strategy, name, cell) for strategy, name, cell in cells if strategy != "autoregressive"]
    assert len(tested) >= 6
    raw = []
    for strategy, name, cell in tested:
        plain, other = ({q: s for q, s in seconds.items() if q in of(run, name)} for seconds in times_of(run, strategy))
        logs = [math.log(plain[q] / other[q]) for q in plain]
        raw.append(sign_flip_p(logs))
        assert cell.detectable == pytest.approx(minimum_detectable_ratio(logs))
        assert cell.speedup_geometric is not None
        assert cell.speedup_geometric.estimate == pytest.approx(math.exp(np.mean(logs)))
    assert [cell.p_value for *_, cell in tested] == pytest.approx(holm(raw))
    assert [cell.p_value for *_, cell in tested] != pytest.approx(raw)
    assert all(math.isnan(cell.p_value) for strategy, _, cell in cells if strategy == "autoregressive")


def of(run: Run, category: str) -> set[int | str]:
    return {record.question_id for record in run if record.category == category}


def times_of(run: Run, strategy: str) -> tuple[dict[int | str, float], dict[int | str, float]]:
    return per_question_seconds(run, "autoregressive"), per_question_seconds(run, strategy)
