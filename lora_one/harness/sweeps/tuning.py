"""Which settings of a method to try: the same number of trials for every method.

The search is a grid along one setting after the other, by the validation loss:

1. every learning rate of the grid, everything else as configured;
2. while the best rate is the lowest or the highest one tried, one more beyond it;
3. the values of each further setting that the method has (gamma, damping, LoRA+'s ratio), in turn;
4. what is left of the trials: rates half way, on a logarithmic scale, between the best and its
   neighbours.

So a method with more settings spends on them what another spends on a finer rate, and nobody gets
more trials. It depends on the losses alone: a search that was interrupted goes on where it was.
"""

import math
from collections.abc import Generator, Mapping, Sequence

# What a method or an optimiser is tuned over: key of comparison.grid -> key of the configuration.
TUNED = {
    "learning_rate": "model.learning_rate",
    "stable_gamma": "init.stable_gamma",
    "damping": "optimizer.damping",
    "lr_ratio": "optimizer.lr_ratio",
}

Setting = tuple[float, ...]
"""One value per axis, the learning rate first."""


def search(
    axes: Sequence[Sequence[float]], start: Setting, trials: int
) -> Generator[list[Setting], Mapping[Setting, float], None]:
    """Yield settings to try; send their validation losses, infinity for one that diverged.

    Args:
        axes: The grid, ascending: rates first, at least two, then each further setting's values.
        start: Where the further settings stand while the rates are tried.
        trials: How many settings to yield in all, at least as many as there are rates.
    """
    rates, *others = axes
    factor = rates[1] / rates[0]
    losses: dict[Setting, float] = {}
    losses |= yield [(rate, *start[1:]) for rate in rates]
    while len(losses) < trials and (beyond := _beyond_edge(losses, factor)):
        losses |= yield [beyond]
    for axis, values in enumerate(others, start=1):
        at = best(losses)
        untried = [(*at[:axis], value, *at[axis + 1 :]) for value in values if value != at[axis]]
        if untried := untried[: trials - len(losses)]:
            losses |= yield untried
    while len(losses) < trials:
        losses |= yield [_half_way(losses, factor)]


def best(losses: Mapping[Setting, float]) -> Setting:
    """Return the setting with the lowest loss; of equal ones the smallest."""
    return min(losses, key=lambda setting: (losses[setting], setting))


def _beyond_edge(losses: Mapping[Setting, float], factor: float) -> Setting | None:
    """Return the next rate beyond the best, if that is the lowest or the highest; else None."""
    rate, *others = best(losses)
    tried = sorted(setting[0] for setting in losses)
    if rate == tried[-1]:
        return (_rounded(rate * factor), *others)
    if rate == tried[0]:
        return (_rounded(rate / factor), *others)
    return None


def _half_way(losses: Mapping[Setting, float], factor: float) -> Setting:
    """Return the geometric mean of the best rate and a neighbour: the one across the wider gap.

    Neighbours are rates that were tried beside the same further settings. Where there is none on
    one side, the grid's next rate stands in for it.
    """
    rate, *others = best(losses)
    tried = [setting[0] for setting in losses if list(setting[1:]) == others]
    below = max((one for one in tried if one < rate), default=rate / factor)
    above = min((one for one in tried if one > rate), default=rate * factor)
    low, high = (below, rate) if rate / below >= above / rate else (rate, above)
    middle = math.sqrt(low * high)
    return (_rounded(middle) if low < _rounded(middle) < high else middle, *others)


def _rounded(rate: float) -> float:
    """Three significant digits, as a person would write it."""
    return float(f"{rate:.3g}")
