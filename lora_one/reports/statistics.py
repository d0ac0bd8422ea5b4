"""Mean, spread, and whether a difference between two settings is more than noise over seeds.

A difference is judged on pairs: two settings run with the same seed share rows, order and random
numbers, so that the difference within a pair varies less than the settings themselves.

The interval is the hull of two 95 % intervals of the mean difference. The percentile bootstrap
assumes nothing about the distribution, but is too narrow for few pairs: of three differences with
one sign, which chance alone gives in one comparison of four, it never contains 0. Student's t
interval, which assumes normal differences, is wide enough there. A difference counts as real only
where both exclude 0.

Neither interval knows of other test rows than those that were asked.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
RESAMPLES = 10_000

RULE = (
    "The difference to the best row is taken per seed. It counts as real where its 95 % interval "
    "excludes 0; the interval is the wider of a paired bootstrap (10,000 resamples of the seeds) "
    "and Student's t, because a bootstrap of few seeds is too narrow; below six seeds it rests on "
    "the differences being normal. ≈ marks rows that cannot be told from the best by this rule. "
    "Test rows are the same for all, so the intervals say nothing about other test rows."
)

Interval = tuple[float, float]


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean of at least one value."""
    return statistics.fmean(values)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where a value is missing."""
    return None if any(value is None for value in values) else mean(values)


def sd(values: Sequence[float]) -> float | None:
    """Return ``sqrt(sum (x - mean)^2 / (n - 1))``; None for fewer than two values."""
    return None if len(values) < 2 else statistics.stdev(values)


def bootstrap_interval(
    differences: Sequence[float],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of the mean (Efron, 1979).

    Args:
        differences: One per pair, at least one.
        level: Share of the resampled means inside the interval.
        resamples: How many times the pairs are drawn with replacement.
        seed: Of the draws.

    Returns:
        Lower and upper end: each is a mean that was drawn.
    """
    values = np.asarray(differences, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    # A mean of n terms is rounded: without this, a constant difference would have a width.
    means = np.round(values[drawn].mean(axis=1), 12)
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(means, tails, method="nearest")
    return float(low), float(high)


def student_interval(differences: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return ``mean -+ t_(n-1) sd / sqrt(n)``, Student's interval, of at least two differences."""
    n = len(differences)
    centre, spread = statistics.fmean(differences), statistics.stdev(differences)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * spread / math.sqrt(n)
    return centre - half, centre + half


@dataclass(frozen=True)
class Difference:
    """The difference between two settings over the seeds that both have.

    Attributes:
        n: Number of pairs.
        mean: Mean of ours minus theirs; None without a pair.
        bootstrap: Percentile bootstrap interval; None below two pairs.
        student: Student's interval; None below two pairs.
    """

    n: int
    mean: float | None
    bootstrap: Interval | None
    student: Interval | None

    @property
    def interval(self) -> Interval | None:
        """The hull of both intervals, by which the difference is judged."""
        if self.bootstrap is None or self.student is None:
            return None
        return min(self.bootstrap[0], self.student[0]), max(self.bootstrap[1], self.student[1])

    @property
    def is_real(self) -> bool | None:
        """Whether the interval excludes 0; None where there is no interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return low > 0 or high < 0


def paired_difference(
    ours: Mapping[object, float], theirs: Mapping[object, float], *, seed: int = 0
) -> Difference:
    """Compare two settings on the seeds that both have.

    Args:
        ours: Seed -> value.
        theirs: The same of what we are compared with.
        seed: Of the bootstrap.
    """
    common = sorted(ours.keys() & theirs.keys(), key=str)
    differences = [ours[key] - theirs[key] for key in common]
    if len(differences) < 2:
        only = differences[0] if differences else None
        return Difference(len(differences), only, None, None)
    return Difference(
        len(differences),
        mean(differences),
        bootstrap_interval(differences, seed=seed),
        student_interval(differences),
    )


def verdict(difference: Difference, *, higher_is_better: bool = True) -> str:
    """Say in words what a difference amounts to."""
    if difference.n == 0:
        return "not judged: no seed in common"
    if difference.n == 1:
        return "not judged: one seed in common, no spread"
    if not difference.is_real:
        return "cannot be told from noise"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
