"""One layer's start: from its gradient, weight or inputs to factors, and what to report of them."""

from torch import Tensor

from lora_one.adapters.report import InitReport, LayerReport
from lora_one.adapters.write import Options
from lora_one.gradients.estimate import finite_norm
from lora_one.gradients.inputs import Statistic
from lora_one.gradients.stream import Ranks
from lora_one.layers import AdaptedLayer, base_weight, is_out_of_reach, is_readable
from lora_one.numerics.factors import Factors, Layer, clip_to_weight
from lora_one.numerics.outer_products import OuterProducts
from lora_one.numerics.precision import full_precision
from lora_one.numerics.svd import Summands, cheaper_unformed, expected_columns


def start_layer(
    layer: AdaptedLayer,
    options: Options,
    gradient: Tensor | OuterProducts | None,
    report: InitReport,
    ranks: Ranks | None = None,
    inputs: Statistic | None = None,
) -> tuple[Factors, LayerReport] | None:
    """Return a layer's factors and report, or None if its gradient is zero or no input reached it.

    Args:
        layer: the layer.
        options: the method and its options.
        gradient: of the layer; None for methods that use none.
        report: told of a layer that is left alone.
        ranks: if given, ``gradient`` is this rank's summand.
        inputs: of the layer; None for methods that use none.
    """
    norm = None
    if inputs is not None and inputs.count == 0:
        report.left_to_peft.append(layer.name)
        report.warnings.append(
            f"no input other than zero reaches '{layer.name}'; the layer keeps PEFT's own start."
        )
        return None
    C = None if inputs is None else inputs.of_rank(layer.name, layer.r)
    if gradient is not None:
        if ranks is not None and not _adds_up_products(layer, options):
            gradient, ranks = ranks.add_up(gradient), None
        if ranks is None and isinstance(gradient, Tensor):
            norm = finite_norm(layer.name, gradient)
    factors = _compute_factors(layer, options, gradient, ranks, C)
    if factors.svd is not None and factors.svd.norm is not None:
        norm = factors.svd.norm
    if gradient is not None and norm == 0:
        report.left_to_peft.append(layer.name)
        report.warnings.append(
            f"the gradient of '{layer.name}' is zero; the layer keeps PEFT's own start."
        )
        return None
    # The decomposition is as large as the factors, or larger, and all layers wait for the last.
    return factors._replace(svd=None), _layer_report(layer, factors, norm)


def stays_unformed(layer: AdaptedLayer, options: Options, ranks: Ranks | None) -> bool:
    """Tell whether to multiply with the tokens' vectors rather than with G formed from them."""
    return (
        options.spec.triplets_only
        and cheaper_unformed(*layer.shape, options.spec.rank_multiple * layer.r)
        and (ranks is None or _adds_up_products(layer, options))
    )


def _compute_factors(
    layer: AdaptedLayer,
    options: Options,
    gradient: Tensor | OuterProducts | None,
    summands: Summands | None = None,
    C: Tensor | None = None,
) -> Factors:
    """Return the method's B (out, r) and A (r, in) in the computing dtype, before rounding.

    Args:
        layer: the layer.
        options: the method and its options.
        gradient: where the method needs it; this rank's summand of it if ``summands`` is given.
        summands: the ranks.
        C: (in, in) statistic of the layer's inputs where the method needs it.
    """
    m, n = layer.shape
    W = base_weight(layer.module) if options.reads_weight else None
    problem = Layer(
        m=m,
        n=n,
        r=layer.r,
        s=layer.s,
        scale=options.scale,
        gamma=options.stable_gamma,
        seed=options.seed,
        name=layer.name,
        W=W,
        G=gradient,
        summands=summands,
        C=C,
        device=layer.A.device,
    )
    with full_precision(layer.A.device):
        factors = options.spec.function(problem)
        return clip_to_weight(factors, W, layer.s) if options.norm_clip else factors


def _layer_report(layer: AdaptedLayer, factors: Factors, norm: float | None) -> LayerReport:
    """Return what is worth knowing about a layer's start; see ``LayerReport``.

    Args:
        layer: the layer.
        factors: its start.
        norm: Frobenius norm of what was decomposed, None for W.
    """
    report = LayerReport(layer.name, layer.shape, layer.r)
    unknown = not is_readable(layer.module) or is_out_of_reach(layer)
    W_norm = None if unknown else float(base_weight(layer.module).float().norm())
    if W_norm:
        report.norm_ratio = _product_norm(factors.B, factors.A, layer.s) / W_norm
    if factors.svd is not None:
        report.singular_values = factors.svd.S.tolist()
        report.next_singular_value = factors.svd.next_value
        report.svd_error = factors.svd.error
        norm = W_norm if norm is None else norm
        energy = sum(value**2 for value in report.singular_values)
        report.captured_energy = min(energy / norm**2, 1.0) if norm else 0.0
    return report


def _product_norm(B: Tensor, A: Tensor, s: float) -> float:
    """Return ``||s B A||_F`` from the r x r Gram matrices: sqrt(tr(BᵀB AAᵀ)) s."""
    B, A = B.float(), A.float()
    with full_precision(B.device):
        return s * float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


def _adds_up_products(layer: AdaptedLayer, options: Options) -> bool:
    """Tell whether ranks add up products with G rather than G: where that sends less.

    Each column of the basis is multiplied with G from both sides and agreed on once, about
    ``1.5 columns (m + n)`` numbers in two dozen messages, against ``m n`` in one. Below a third of
    the volume the messages' latency is worth it.
    """
    m, n = layer.shape
    columns = expected_columns(options.spec.rank_multiple * layer.r)
    return options.spec.triplets_only and m * n >= 4.5 * columns * (m + n)
