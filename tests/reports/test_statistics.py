"""Means, deviations, intervals and verdicts against values worked out by hand."""

import math

import pytest

from lora_one.reports.statistics import (
    Difference,
    bootstrap_interval,
    mean,
    paired_difference,
    sd,
    student_interval,
    verdict,
)


def test_mean_and_deviation_of_four_numbers():
    # Deviations -3, -1, 1, 3: squares sum to 20, divided by n - 1 = 3.
    assert mean([1, 3, 5, 7]) == 4
    assert sd([1, 3, 5, 7]) == pytest.approx(math.sqrt(20 / 3))


def test_one_value_has_no_deviation():
    assert sd([0.4]) is None


def test_the_bootstrap_of_three_numbers_ends_at_the_smallest_and_the_largest():
    # The 27 equally likely means of draws from {1, 2, 3}: 1 and 3 have a probability of 1/27 =
    # 3.7 % each, more than the 2.5 % that the interval leaves out on either side.
    assert bootstrap_interval([1.0, 2.0, 3.0]) == (1.0, 3.0)


def test_the_bootstrap_leaves_out_what_is_rarer_than_its_tails():
    # Of ten numbers 0 and ten 1 a mean is binomial(20, 1/2) / 20; P(X <= 5) = 2.07 %,
    # P(X <= 6) = 5.77 %: the 2.5 % quantile is 6/20, and by symmetry the other one 14/20.
    assert bootstrap_interval([0.0] * 10 + [1.0] * 10) == (0.3, 0.7)


def test_the_bootstrap_repeats_itself_and_follows_its_seed():
    values = [0.31, 0.48, 0.11, 0.92, 0.55]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    draws = {bootstrap_interval(values, resamples=50, seed=seed) for seed in range(5)}
    assert len(draws) > 1


def test_a_constant_difference_has_no_width():
    assert bootstrap_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)


def test_student_s_interval_of_three_numbers():
    # t_(2, 0.975) = 4.302653 (any table); sd of 1, 2, 3 is 1; half width 4.302653 / sqrt(3).
    low, high = student_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.484137, 2 + 2.484137), abs=1e-5)


def test_only_seeds_that_both_have_are_paired():
    difference = paired_difference({0: 0.5, 1: 0.7, 2: 0.9}, {1: 0.6, 2: 0.6, 3: 0.1})
    assert difference.n == 2
    assert difference.mean == pytest.approx(0.2)  # (0.1 + 0.3) / 2


def test_the_interval_is_the_wider_of_both():
    difference = paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    # The bootstrap alone excludes 0 here, on three seeds of one sign: one comparison of four does
    # so by chance. Student's interval, -0.48 to 4.48, does not.
    assert difference.bootstrap == (1.0, 3.0)
    assert difference.interval == difference.student
    assert difference.is_real is False
    assert verdict(difference) == "cannot be told from noise"


def test_pairing_finds_what_the_spread_over_seeds_hides():
    theirs = {seed: 0.1 * seed for seed in range(6)}
    ours = {seed: value + 0.02 + 0.001 * (seed % 2) for seed, value in theirs.items()}
    difference = paired_difference(ours, theirs)
    assert difference.is_real
    assert verdict(difference) == "better"
    assert verdict(difference, higher_is_better=False) == "worse"


@pytest.mark.parametrize(
    ("seeds", "words"),
    [((), "not judged: no seed in common"), ((0,), "not judged: one seed in common, no spread")],
)
def test_too_few_pairs_are_not_judged(seeds, words):
    difference = paired_difference(dict.fromkeys(seeds, 0.5), {0: 0.4})
    assert difference.interval is None
    assert difference.is_real is None
    assert verdict(difference) == words


def test_equal_results_are_no_difference():
    difference = paired_difference({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert difference == Difference(2, 0.0, (0.0, 0.0), (0.0, 0.0))
    assert difference.is_real is False
