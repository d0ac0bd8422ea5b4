"""How far the adapters' leading singular spaces are from those of the one-step gradient."""

from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from lora_one.numerics.angles import principal_angles
from lora_one.numerics.svd import truncated_svd


def left_space(M: Tensor, rank: int) -> Tensor:
    """Return ``U_rank(M)``, orthonormal columns of the leading left singular space."""
    return truncated_svd(M, rank).U


def misalignment(X: Tensor, Y: Tensor) -> float:
    """Return ``||U_⊥ᵀ(Y) U(X)||_op``: the sine of the largest principal angle (LoRA-One, eq. 7).

    Args:
        X: (d, p) with independent columns.
        Y: (d, q) with independent columns.
    """
    return float(principal_angles(X, Y)[-1].sin())


class LogFit(NamedTuple):
    """``y = intercept + slope ln x`` with the 95 % confidence interval of the slope."""

    slope: float
    intercept: float
    low: float
    high: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the fitted y."""
        return self.intercept + self.slope * x.log()


def fit_log(x: Tensor, y: Tensor) -> LogFit:
    """Fit ``y = a + b ln x`` by least squares; the interval is Student's, with n - 2 degrees."""
    line = stats.linregress(x.log().numpy(), y.numpy())
    margin = stats.t.ppf(0.975, len(x) - 2) * line.stderr
    slope = float(line.slope)
    return LogFit(slope, float(line.intercept), slope - float(margin), slope + float(margin))


def first_crossing(steps: Tensor, values: Tensor, level: float) -> float:
    """Return when a falling series first reaches ``level``, between steps by its logarithm.

    Returns inf where it never does.
    """
    below = (values <= level).nonzero()
    if not len(below):
        return float("inf")
    i = int(below[0])
    if i == 0:
        return float(steps[0])
    before, after = values[i - 1].log(), values[i].log()
    share = (before - torch.tensor(level, dtype=values.dtype).log()) / (before - after)
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
