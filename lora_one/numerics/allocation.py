"""How a budget of adapter parameters is shared out over layers, from singular values alone.

A rank in a layer with W of (m, n) costs ``c = m + n`` parameters, one column of B and one row of
A. What the k-th rank of layer l gains is ``g_{l,k}``, for a method that uses one singular triplet
per rank ``σ_{l,k}²``.
"""

import heapq
import math
from collections.abc import Sequence


def share_budget(gains: Sequence[Sequence[float]], costs: Sequence[int], rank: int) -> list[int]:
    """``max Σ_l Σ_{k <= r_l} g_{l,k}`` over ranks r with ``Σ_l r_l c_l <= rank Σ_l c_l``.

    Every layer gets rank 1. Then the next rank goes where ``g_{l,r_l+1} / c_l`` is largest among
    the layers that it still fits into, until it fits nowhere. Since each layer's gains fall with
    k, this is the optimum where all costs are equal; elsewhere it is the optimum of the problem
    with fractions of ranks but for the last items, so that less is missing than the largest
    single gain left out (Dantzig 1957). Should equal ranks gain more, they are returned.

    Equal gains per parameter go to the layer with the lower rank, then to the first one.

    Args:
        gains: per layer, of its first, second, ... rank, never increasing; as many as the layer
            may have ranks, at least ``rank``.
        costs: per layer, parameters of one rank.
        rank: the uniform rank whose parameters are the budget.

    Returns:
        One rank per layer.

    Raises:
        ValueError: if ``rank`` is below 1, or a layer has fewer gains.
    """
    if rank < 1 or any(len(layer) < rank for layer in gains):
        raise ValueError(f"rank must be at least 1 and have a gain in every layer, got {rank}.")
    ranks = [1] * len(gains)
    left = (rank - 1) * sum(costs)

    def bid(layer: int) -> tuple[float, int, int]:
        return -gains[layer][ranks[layer]] / costs[layer], ranks[layer], layer

    bids = [bid(layer) for layer in range(len(gains)) if len(gains[layer]) > 1]
    heapq.heapify(bids)
    while bids:
        _, _, layer = heapq.heappop(bids)
        if costs[layer] > left:  # the rest only shrinks: this layer is done
            continue
        left -= costs[layer]
        ranks[layer] += 1
        if ranks[layer] < len(gains[layer]):
            heapq.heappush(bids, bid(layer))
    uniform = [rank] * len(gains)
    return max(ranks, uniform, key=lambda choice: captured(gains, choice))


def captured(gains: Sequence[Sequence[float]], ranks: Sequence[int]) -> float:
    """Return ``Σ_l Σ_{k <= r_l} g_{l,k}``, exactly rounded, so that no order of layers matters."""
    return math.fsum(g for layer, r in zip(gains, ranks, strict=True) for g in layer[:r])
