"""Ranks by spectrum: which rank each layer's adapter should have under a budget of parameters.

The captured energy of a gradient is what a step can gain: among all updates with
``rank(ΔW_l) <= r_l`` and ``Σ_l ||ΔW_l||_F² <= ε²``, the loss falls to first order by at most
``ε sqrt(Σ_l Σ_{i <= r_l} σ_{l,i}²)``, σ being the singular values of G_l. So the energies are
compared between layers as they are. Divided by ``||G_l||_F²`` (as EVA does with activations,
Paischer et al. 2024) a layer that hardly matters to the loss would be worth as much as one that
decides it.
"""

import math
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_one.adapters.checks import check_readable
from lora_one.adapters.stored import pattern_key
from lora_one.adapters.write import Options
from lora_one.errors import InputError, not_finite
from lora_one.gradients.estimate import finite_norm
from lora_one.gradients.stream import stream_gradients, together
from lora_one.gradients.tokens import Batch
from lora_one.layers import TargetLayer, base_weight, model_device, plain_layers
from lora_one.numerics.allocation import captured, share_budget
from lora_one.numerics.outer_products import OuterProducts
from lora_one.numerics.svd import cheaper_unformed, private_generator, truncated_svd

LARGEST = 4
"""A layer gets at most so many times the uniform rank: what is looked at, and held, is bounded."""


@dataclass(frozen=True)
class RankAllocation:
    """Ranks for the layers of a model, and what they gain.

    Attributes:
        ranks: layer name -> rank, in the model's order; PEFT's ``rank_pattern``, in which a name
            that is also the end of another layer's is anchored (``^name``).
        parameters: of all adapters, ``Σ_l r_l (m_l + n_l)``.
        budget: what equal ranks take, ``r Σ_l (m_l + n_l)``.
        captured_energy: share of ``Σ_l ||M_l||_F²`` in the singular values that are used, M_l
            being G_l or W_l; 0 where all are zero.
        uniform_energy: the same with equal ranks.
        seconds: that it took.
    """

    ranks: dict[str, int]
    parameters: int
    budget: int
    captured_energy: float
    uniform_energy: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line: smallest and largest rank, parameters, captured energy."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        return (
            f"ranks {low} to {high}, {self.parameters:,} of {self.budget:,} parameters, energy "
            f"{100 * self.captured_energy:.1f} % ({100 * self.uniform_energy:.1f} % uniform)"
        )


def allocate_ranks(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    rank: int,
    target_modules: Collection[str] | str = "all-linear",
    method: str = "lora_one",
    seed: int = 0,
    train: bool = True,
    strategy: str = "auto",
    memory_budget: int | None = None,
) -> RankAllocation:
    """``max Σ_l Σ_{i <= q r_l} σ_{l,i}²`` with ``Σ_l r_l (m_l + n_l) <= r Σ_l (m_l + n_l)``.

    Before ``get_peft_model``, whose configuration takes the result::

        found = lora_one.allocate_ranks(base, batches, rank=8)
        alphas = lora_one.alpha_pattern(found.ranks, r=8, lora_alpha=16, use_rslora=True)
        config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear",
                            rank_pattern=found.ranks, alpha_pattern=alphas)

    σ are singular values of the one-step gradient, of W for the methods that start from W
    (``pissa``, ``olora``). q is 2 for ``lora_ga``, which uses 2 r triplets, otherwise 1. Ranks are
    between 1 and ``min(4 r, min(m, n) / q)``; see ``share_budget`` for how they are found.

    The gradient costs a forward and a backward pass over the batches, which ``initialize`` will
    repeat. Layers are handed over one by one, and of each only singular values are kept. Under
    ``torch.distributed`` each rank passes its share of the batches, and all get the same ranks.

    Args:
        model: without adapters; left as it was found.
        batches: the init batch as micro-batches; needed for the singular values of gradients.
        rank: the uniform rank whose parameters are the budget.
        target_modules: as in PEFT: names or endings, a regular expression, or ``"all-linear"``.
        method: that will start the adapter.
        seed: of the randomised SVD and of dropout.
        train: whether dropout is active while the gradient is taken.
        strategy: how several micro-batches are run, see ``lora_one.gradients.plan``.
        memory_budget: bytes of gradients that may wait for later micro-batches.

    Returns:
        The ranks, and what they gain over equal ones.

    Raises:
        InputError: for a model with adapters, a rank that a layer cannot have, missing batches.
        NonFiniteError: for a loss or gradient that is not finite, naming the layer.
    """
    spec = Options(method=method).spec
    if spec.inputs:
        raise InputError(
            f"ranks are allocated by the gradient or by W, and {method} looks at the layers' "
            "inputs: leave the ranks uniform."
        )
    if isinstance(model, PeftModel):
        raise InputError(
            "ranks are allocated before there is an adapter: pass the model that get_peft_model "
            "will be given."
        )
    layers = plain_layers(model, target_modules)
    q = spec.rank_multiple
    _check_rank(layers, rank, q, method)
    counts = {x.name: q * min(LARGEST * rank, min(x.shape) // q) for x in layers}
    began = time.perf_counter()
    squares: dict[str, list[float]] = {}
    totals: dict[str, float] = {}
    ranks = together()

    def measure(name: str, matrix: Tensor | OuterProducts, norm: float | None = None) -> None:
        generator = private_generator(seed, f"{name}/svd")
        summands = None if norm is not None else ranks
        try:
            svd = truncated_svd(matrix, counts[name], generator=generator, summands=summands)
        except FloatingPointError:
            raise not_finite(name, spec.needs) from None
        squares[name] = svd.S.double().square().tolist()
        totals[name] = (svd.norm if norm is None else norm) ** 2

    def measure_gradient(name: str, G: Tensor | OuterProducts) -> None:
        whole = ranks is None and isinstance(G, Tensor)
        measure(name, G, finite_norm(name, G) if whole else None)

    if spec.needs == "weight":
        for layer in layers:
            check_readable(layer, method)
            W = base_weight(layer.module)
            measure(layer.name, W, float(W.float().norm()))
    elif batches is None:
        raise InputError(f"the ranks of {method} follow the gradient: pass the init batches.")
    else:
        stream_gradients(
            model,
            batches,
            layers,
            measure_gradient,
            train=train,
            seed=seed,
            strategy=strategy,
            memory_budget=memory_budget,
            add_up=False,
            unformed={x.name for x in layers if cheaper_unformed(*x.shape, counts[x.name])},
        )
    squares = _agreed(squares, model)
    gains = [_per_rank(squares[layer.name], q) for layer in layers]
    costs = [sum(layer.shape) for layer in layers]
    found = share_budget(gains, costs, rank)
    total = math.fsum(totals.values()) or 1.0
    names = [layer.name for layer in layers]
    return RankAllocation(
        {pattern_key(name, names): r for name, r in zip(names, found, strict=True)},
        sum(r * cost for r, cost in zip(found, costs, strict=True)),
        rank * sum(costs),
        captured(gains, found) / total,
        captured(gains, [rank] * len(layers)) / total,
        time.perf_counter() - began,
    )


def alpha_pattern(
    ranks: Mapping[str, int], *, r: int, lora_alpha: float, use_rslora: bool
) -> dict[str, float]:
    """``alpha_l = alpha sqrt(r_l / r)`` with rsLoRA, ``alpha r_l / r`` without.

    So ``s = alpha_l / sqrt(r_l)`` (or ``alpha_l / r_l``) is that of the uniform rank in every
    layer, to rounding, and ranks are all that differs from a uniform adapter. It also makes
    loaders right that read ``lora_alpha`` and ``r`` alone.

    Args:
        ranks: layer name -> rank, as ``allocate_ranks`` finds them.
        r: the uniform rank.
        lora_alpha: alpha at rank r.
        use_rslora: whether ``s = alpha / sqrt(r)``.

    Returns:
        Layer name -> alpha, for ``LoraConfig(alpha_pattern=...)``; layers of rank r are left out.
    """
    power = 0.5 if use_rslora else 1.0
    return {name: lora_alpha * (own / r) ** power for name, own in ranks.items() if own != r}


def _check_rank(layers: Collection[TargetLayer], rank: int, q: int, method: str) -> None:
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}.")
    smallest = min(layers, key=lambda layer: min(layer.shape))
    largest = min(smallest.shape) // q
    if rank > largest:
        raise InputError(
            f"rank {rank} is too large for layer '{smallest.name}' of shape {smallest.shape}: "
            f"{method} can have at most rank {largest} there."
        )


def _per_rank(squares: list[float], q: int) -> list[float]:
    """Sum q squares per rank, of singular values in descending order."""
    return [math.fsum(squares[start : start + q]) for start in range(0, len(squares), q)]


def _agreed(squares: dict[str, list[float]], model: nn.Module) -> dict[str, list[float]]:
    """Return rank 0's values: a last bit that differs could decide a rank."""
    ranks = together()
    if ranks is None:
        return squares
    names = sorted(squares)
    values = [value for name in names for value in squares[name]]
    whole = torch.tensor(values, dtype=torch.float64, device=model_device(model))
    parts = ranks.agree(whole).split([len(squares[name]) for name in names])
    return {name: part.tolist() for name, part in zip(names, parts, strict=True)}
