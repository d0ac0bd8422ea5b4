"""``stable_gamma="auto"``: the size of the start, searched by the init batch's loss."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real

from peft import PeftModel

from lora_one.adapters.report import InitReport
from lora_one.adapters.write import write_factors
from lora_one.errors import InputError
from lora_one.gradients.stream import mean_loss
from lora_one.gradients.tokens import Batch
from lora_one.layers import AdaptedLayer
from lora_one.numerics.factors import Factors
from lora_one.numerics.methods import METHODS

CANDIDATES = tuple(4.0**k for k in range(9))
"""What is tried: 1 to 65536. The loss is smooth in log gamma."""


def is_auto(
    stable_gamma: float | str, method: str, scale: str, batches: Iterable[Batch] | None
) -> bool:
    """Whether gamma is to be searched.

    Raises:
        InputError: for another string, or where a search has nothing to compare.
    """
    if isinstance(stable_gamma, Real):
        return False
    if stable_gamma != "auto":
        raise InputError(f"stable_gamma must be a positive number or 'auto', got {stable_gamma!r}.")
    able = [name for name, spec in METHODS.items() if spec.searches_gamma]
    if method not in able or scale != "stable" or batches is None:
        raise InputError(
            "stable_gamma='auto' compares losses after the start, so it needs batches, method "
            f"{' or '.join(map(repr, able))} and scale 'stable'; the other methods start at the "
            "base model's loss."
        )
    return True


def search_gamma(
    peft_model: PeftModel,
    layers: list[AdaptedLayer],
    starts: Mapping[str, Factors],
    batches: list[Batch],
    report: InitReport,
    train: bool,
    seed: int,
) -> float:
    """Return the candidate with the lowest loss of the init batch, and report all of them.

    Forward passes only, one sweep over the batches per candidate. Afterwards the adapter is as it
    was before.

    Args:
        peft_model: lends its adapter to each candidate's factors.
        layers: to write.
        starts: factors for gamma = 1.
        batches: the init batch.
        report: gets ``gamma_search``.
        train: as for the gradient.
        seed: of dropout.
    """
    started = [layer for layer in layers if layer.name in starts]
    before = [(layer.B.detach().clone(), layer.A.detach().clone()) for layer in started]
    try:
        for gamma in CANDIDATES:
            for layer in started:
                factors = rescale(starts[layer.name], gamma)
                write_factors(layer, factors.B, factors.A, None)
            loss = mean_loss(peft_model, batches, train=train, seed=seed)
            report.gamma_search.append({"stable_gamma": gamma, "loss": loss})
    finally:
        for layer, (B, A) in zip(started, before, strict=True):
            write_factors(layer, B, A, None)
    finite = [entry for entry in report.gamma_search if math.isfinite(entry["loss"])]
    if not finite:
        raise InputError("no stable_gamma gives a finite loss on the init batch.")
    return min(finite, key=lambda entry: entry["loss"])["stable_gamma"]


def rescale(factors: Factors, gamma: float) -> Factors:
    """Return factors computed with gamma = 1 for another: both times the root of ``share``."""
    root = math.sqrt(share(factors, gamma))
    return factors._replace(B=factors.B * root, A=factors.A * root)


def share(factors: Factors, gamma: float) -> float:
    """Return ``min(1 / (gamma ρ), 1)``: how much of B A a gamma of at least 1 leaves.

    ρ is what the product was clipped to, 1 without ``norm_clip``. What gamma makes small enough is
    not clipped: the product ``min(1 / gamma, ρ)`` of the unclipped one is wanted, ρ of it is given.
    """
    return 1 / max(gamma * factors.clipped, 1.0)
