"""Where the factors of an adapter point while it trains, and what training has added to its layers.

The reference is the one-step gradient G = U S Vᵀ of the base model. Plain LoRA's factors turn
towards its leading singular spaces, B to U's and A to V's, and LoRA-One starts in them (Zhang et
al. 2025, figure 2 and theorem 3.1).
"""

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_one.gradients.estimate import check_finite
from lora_one.gradients.stream import Sweep, stream_gradients
from lora_one.gradients.tokens import Batch
from lora_one.layers import AdaptedLayer, plain_layers
from lora_one.numerics.angles import leading_directions, principal_angles
from lora_one.numerics.svd import private_generator, truncated_svd
from lora_one.numerics.update import update_singular_values

# Of what is logged: fp32 has no more, and the log is a text.
DIGITS = 6

Factors = tuple[Tensor, Tensor]


class GradientSpace(NamedTuple):
    """A layer's leading singular spaces: U (out, rank) and V (in, rank), fp32, on the CPU."""

    U: Tensor
    V: Tensor


def gradient_spaces(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Collection[str],
    rank: int,
    *,
    seed: int = 0,
    keeps: bool = True,
) -> tuple[dict[str, GradientSpace], Sweep]:
    """Return the singular spaces of some layers' one-step gradients, and what the batches were.

    Each gradient is decomposed as soon as it is complete, and dropped.

    Args:
        model: the base model, without adapters; left as it was found.
        batches: keyword arguments of the model, with labels. Under ``torch.distributed`` each rank
            passes its share.
        names: of linear layers of the model.
        rank: how many singular vectors.
        seed: of dropout and of the randomised SVD; LoRA-One's seed gives LoRA-One's gradient.
        keeps: False on ranks that only help to add up the gradients; they get no spaces.

    Returns:
        Layer -> its spaces. A layer whose gradient has a rank below ``rank`` has none.

    Raises:
        NonFiniteError: for a loss or gradient that is not finite.
    """
    spaces: dict[str, GradientSpace] = {}

    def decompose(name: str, gradient: Tensor) -> None:
        check_finite(name, gradient)
        if not keeps:
            return
        svd = truncated_svd(gradient, rank, generator=private_generator(seed, f"{name}/svd"))
        if svd.S[-1] > max(gradient.shape) * torch.finfo(svd.S.dtype).eps * svd.S[0]:
            spaces[name] = GradientSpace(svd.U.cpu(), svd.Vh.mT.cpu())

    layers = plain_layers(model, names)
    sweep = stream_gradients(model, batches, layers, decompose, seed=seed)
    return {name: spaces[name] for name in names if name in spaces}, sweep


@torch.no_grad()
def measure(
    layer: AdaptedLayer, space: GradientSpace | None, start: Factors | None
) -> dict[str, float | list[float] | None]:
    """Return a layer's line of the log: angles in degrees, norm and spectrum of the update.

    The angles are the largest between the factor's leading directions and the gradient's, as many
    as both have. They are None where there is nothing to measure: lora_B is zero as LoRA starts,
    or the gradient has too few directions. Everything is computed on the CPU, where LAPACK is quick
    with matrices this narrow.

    Args:
        layer: with its adapter.
        space: of its one-step gradient.
        start: (B0, A0); None where B0 A0 = 0.
    """
    B, A = layer.B.detach().cpu(), layer.A.detach().cpu()
    S = update_singular_values(B, A, layer.s, start)
    return {
        f"principal_angle_B/{layer.name}": None if space is None else _angle(B, space.U),
        f"principal_angle_A/{layer.name}": None if space is None else _angle(A.mT, space.V),
        f"update_norm/{layer.name}": _short(S.norm()),
        f"update_singular_values/{layer.name}": [_short(value) for value in S],
    }


def _angle(factor: Tensor, basis: Tensor) -> float | None:
    k = min(factor.shape[1], basis.shape[1])
    directions = leading_directions(factor, k)
    if directions is None:
        return None
    return _short(math.degrees(principal_angles(directions, basis[:, :k])[-1]))


def _short(value: Tensor | float) -> float:
    return float(f"{float(value):.{DIGITS}g}")
