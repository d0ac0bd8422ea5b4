from fractions import Fraction
from itertools import combinations
from math import comb

import pytest

from lora_one.errors import InputError
from lora_one.evaluation.pass_at_k import mean_pass_at_k, pass_at_k


@pytest.mark.parametrize(
    ("samples", "correct", "k"),
    [(n, c, k) for n in range(1, 8) for c in range(n + 1) for k in range(1, n + 1)],
)
def test_it_is_the_share_of_choices_of_k_replies_with_a_right_one(samples, correct, k):
    choices = list(combinations(range(samples), k))
    exact = Fraction(sum(min(choice) < correct for choice in choices), len(choices))
    assert exact == 1 - Fraction(comb(samples - correct, k), comb(samples, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(float(exact), abs=1e-15)


def test_large_numbers_neither_overflow_nor_lose_digits():
    exact = 1 - Fraction(comb(200 - 3, 100), comb(200, 100))
    assert pass_at_k(200, 3, 100) == pytest.approx(float(exact), rel=1e-12)
    assert pass_at_k(10_000, 0, 1) == 0.0
    assert pass_at_k(10_000, 9_999, 2) == 1.0


def test_pass_at_one_is_the_share_of_right_replies_and_problems_weigh_the_same():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    assert mean_pass_at_k([(1, 1), (10, 0)], 1) == 0.5


@pytest.mark.parametrize(("samples", "correct", "k"), [(1, 1, 2), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_impossible_numbers_are_errors(samples, correct, k):
    with pytest.raises(InputError, match="1 <= k <= replies"):
        pass_at_k(samples, correct, k)
    with pytest.raises(InputError, match="no problem"):
        mean_pass_at_k([], 1)
