"""The two entry points: from batches, or from gradients, to a started adapter and its report."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from lora_one.adapters.cache import fingerprint, load_cached, store
from lora_one.adapters.checks import (
    check_active,
    check_alone,
    check_gradients,
    check_layers,
    check_not_offset,
    check_ties,
    check_untrained,
)
from lora_one.adapters.gamma import is_auto, rescale, search_gamma, share
from lora_one.adapters.report import InitReport, LayerReport
from lora_one.adapters.start import start_layer, stays_unformed
from lora_one.adapters.write import Options, start_adapter
from lora_one.errors import InputError, nearest
from lora_one.gradients.inputs import Statistic, stream_inputs
from lora_one.gradients.stream import agreed_batches, mean_loss, stream_gradients, together
from lora_one.gradients.tokens import Batch
from lora_one.layers import AdaptedLayer, adapted_layers, check_adapter, other_adapted
from lora_one.numerics.factors import Factors
from lora_one.numerics.outer_products import OuterProducts


def initialize(
    peft_model: PeftModel,
    batches: Iterable[Batch] | None = None,
    *,
    method: str,
    scale: str = "stable",
    stable_gamma: float | str = 128.0,
    norm_clip: bool = False,
    seed: int = 0,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    unsupported: str = "leave",
    force: bool = False,
    train: bool = True,
    strategy: str = "auto",
    memory_budget: int | None = None,
    measure_loss: bool = True,
    cache_dir: str | Path | None = None,
) -> InitReport:
    """Start an adapter: estimate what the method needs, compute B0 and A0, write them.

    Each layer's gradient is decomposed as soon as it is complete; those that wait for later
    micro-batches take at most ``memory_budget`` bytes. Under ``torch.distributed`` each rank keeps
    its summand of a large gradient, and the ranks add up its products with a few vectors.

    Args:
        peft_model: with a LoRA adapter; its linear layers are written, others keep PEFT's start.
        batches: the init batch as micro-batches, keyword arguments of the model with labels.
            Needed by ``lora_ga``, ``lora_one``, ``eva`` and ``corda``; for the other methods
            optional, to report the loss before and after. Under ``torch.distributed`` each rank
            passes its share.
        method: a key of ``lora_one.numerics.methods.METHODS``.
        scale: ``"stable"``, ``"unit"``, ``"gd"`` or ``"weightS"``.
        stable_gamma: the official ``init.stable_gamma``; ``"auto"`` (LoRA-One with the stable
            scale) takes the power of 4 with the lowest loss of the init batch after the start.
        norm_clip: shrink the factors until ``max|s B A| <= max|W|``.
        seed: of the random factors, of the randomised SVD and of dropout.
        adapter_name: which adapter.
        dtype: of the written factors; ``None`` keeps the adapter's dtype.
        unsupported: ``"leave"`` lets adapted layers that are not linear (embeddings, convolutions),
            or have no start of their own (see ``dependent_layers``), keep PEFT's start and lists
            them in the report, ``"refuse"`` refuses them.
        force: overwrite factors that are not a start, such as trained ones.
        train: whether dropout is active while the gradient is taken, as in the published codes.
        strategy: how several micro-batches are run, see ``lora_one.gradients.plan``.
        memory_budget: bytes of gradients, or sums of inputs, that may wait for later micro-batches.
        measure_loss: whether to run the init batch once more, forward only, for the loss after
            the start (and before it, for methods without a gradient).
        cache_dir: folder of earlier starts, see ``lora_one.adapters.cache``; None for no cache.

    Returns:
        The report; the factors are on the model, see ``save_initial_state``.

    Raises:
        InputError: for input that cannot be used; the model is unchanged then.
        NonFiniteError: for a loss or gradient that is not finite, naming the layer.
    """
    auto = is_auto(stable_gamma, method, scale, batches)
    options = Options(
        method=method,
        scale=scale,
        stable_gamma=1.0 if auto else float(stable_gamma),
        norm_clip=norm_clip,
        seed=seed,
        dtype=dtype,
    )
    if options.spec.needs == "gradient" and batches is None:
        raise InputError(f"{method} needs the gradient of the loss: pass the init batches.")
    if options.spec.inputs and batches is None:
        raise InputError(f"{method} looks at the layers' inputs: pass the init batches.")
    layers, report = _prepare(peft_model, options, adapter_name, unsupported, force)
    batches = None if batches is None else list(batches)
    if batches is not None:
        check_active(layers)
        report.tokens = sum(tokens for _, tokens in agreed_batches(peft_model, batches))
    began = time.perf_counter()
    if cache_dir is not None:
        more = {"gamma": stable_gamma, "train": train, "measure_loss": measure_loss}
        key = fingerprint(peft_model, layers, batches, options, **more)
        cached = load_cached(peft_model, Path(cache_dir), key, adapter_name)
        if cached is not None:
            return cached
    starts: dict[str, Factors] = {}
    reports: dict[str, LayerReport] = {}
    by_name = {layer.name: layer for layer in layers}
    ranks = together()

    def decompose(
        name: str,
        gradient: Tensor | OuterProducts | None = None,
        inputs: Statistic | None = None,
    ) -> None:
        start = start_layer(by_name[name], options, gradient, report, ranks, inputs)
        if start is not None:
            starts[name], reports[name] = start

    if options.spec.needs != "gradient" and measure_loss and batches is not None and layers:
        report.loss_before = mean_loss(peft_model, batches, train=train, seed=seed, adapters=False)
    if options.spec.needs == "gradient":
        sweep = stream_gradients(
            peft_model,
            batches,
            layers,
            decompose,
            train=train,
            seed=seed,
            strategy=strategy,
            memory_budget=memory_budget,
            add_up=False,
            unformed={layer.name for layer in layers if stays_unformed(layer, options, ranks)},
        )
        report.loss_before, report.tokens = sweep.loss, sweep.tokens
        report.strategy = sweep.strategy
    elif options.spec.inputs:
        stream_inputs(
            peft_model,
            batches,
            layers,
            lambda name, inputs: decompose(name, inputs=inputs),
            statistic=options.spec.inputs,
            memory_budget=memory_budget,
        )
    else:
        for name in by_name:
            decompose(name)
    starts = _agreed(starts)
    if auto:
        with _alone(peft_model, adapter_name):
            gamma = search_gamma(peft_model, layers, starts, batches, report, train, seed)
        options = replace(options, stable_gamma=gamma)
        for name, factors in starts.items():
            ratio = reports[name].norm_ratio
            reports[name].norm_ratio = None if ratio is None else ratio * share(factors, gamma)
        starts = {name: rescale(factors, gamma) for name, factors in starts.items()}
    _finish(peft_model, layers, starts, options, report, reports)
    report.seconds = time.perf_counter() - began
    if measure_loss and batches is not None and layers:
        with _alone(peft_model, adapter_name):
            report.loss_after = mean_loss(peft_model, batches, train=train, seed=seed)
        _advise(report)
    if cache_dir is not None:
        store(peft_model, Path(cache_dir), key, report)
    return report


def initialize_adapters(
    peft_model: PeftModel,
    gradients: Mapping[str, Tensor] | None = None,
    *,
    method: str,
    scale: str = "stable",
    stable_gamma: float = 128.0,
    norm_clip: bool = False,
    seed: int = 0,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    unsupported: str = "leave",
    force: bool = False,
) -> InitReport:
    """Start an adapter from explicit gradients, as ``estimate_gradients`` returns them.

    The same seeds give the same factors as ``initialize``, to rounding; there every option is
    explained.

    Args:
        peft_model: with a LoRA adapter.
        gradients: base model's module name -> mean gradient (out, in); needed by ``lora_ga`` and
            ``lora_one`` for every adapted linear layer, not looked at by other methods.
        method: a key of ``lora_one.numerics.methods.METHODS``.
        scale: the rule for the factors' size.
        stable_gamma: the official ``init.stable_gamma``.
        norm_clip: shrink the factors until ``max|s B A| <= max|W|``.
        seed: of the random factors and of the randomised SVD.
        adapter_name: which adapter.
        dtype: of the written factors.
        unsupported: ``"leave"`` or ``"refuse"`` adapted layers that are not linear.
        force: overwrite factors that are not a start.

    Returns:
        The report, without losses.

    Raises:
        InputError: also for missing or unknown layers and wrong shapes.
        NonFiniteError: for a gradient that is not finite, naming the layer.
    """
    options = Options(
        method=method,
        scale=scale,
        stable_gamma=stable_gamma,
        norm_clip=norm_clip,
        seed=seed,
        dtype=dtype,
    )
    if options.spec.inputs:
        raise InputError(
            f"{method} looks at the layers' inputs, not at gradients: use lora_one.initialize with "
            "the init batches."
        )
    layers, report = _prepare(peft_model, options, adapter_name, unsupported, force)
    needs_gradient = options.spec.needs == "gradient"
    if needs_gradient:
        check_gradients(layers, gradients)
    began = time.perf_counter()
    starts, reports = {}, {}
    for layer in layers:
        gradient = gradients[layer.name].to(layer.A.device) if needs_gradient else None
        start = start_layer(layer, options, gradient, report)
        if start is not None:
            starts[layer.name], reports[layer.name] = start
    starts = _agreed(starts)
    _finish(peft_model, layers, starts, options, report, reports)
    report.seconds = time.perf_counter() - began
    return report


def _prepare(
    peft_model: PeftModel, options: Options, adapter_name: str, unsupported: str, force: bool
) -> tuple[list[AdaptedLayer], InitReport]:
    check_adapter(peft_model, adapter_name)
    check_not_offset(peft_model, adapter_name)
    left = _others(peft_model, adapter_name, unsupported)
    spec = options.spec
    report = InitReport(
        method=options.method,
        equation=spec.equation,
        source=spec.source,
        offset=spec.offset,
        scale=options.scale if spec.uses_scale else None,
        stable_gamma=None,
        norm_clip=options.norm_clip,
        seed=options.seed,
        adapter_name=adapter_name,
        left_to_peft=left,
    )
    if any(isinstance(module, AdaLoraLayer) for module in peft_model.modules()):
        if options.method != "lora":
            raise InputError(
                f"{options.method} cannot start an AdaLoRA adapter, whose product is B E A with "
                "E = 0. Use a LoraConfig, or method 'lora', which leaves PEFT's own start."
            )
        return [], report
    layers = adapted_layers(peft_model, adapter_name)
    check_layers(layers, options)
    if spec.offset:
        check_alone(layers, options.method)
        check_ties(peft_model, layers, options.method)
    if not force:
        check_untrained(peft_model, layers)
    return layers, report


def _others(peft_model: PeftModel, adapter_name: str, unsupported: str) -> list[str]:
    """Return the adapted layers that keep PEFT's start, unless they are to be refused."""
    choices = ("leave", "refuse")
    if unsupported not in choices:
        raise InputError(
            f"unsupported must be 'leave' or 'refuse', got '{unsupported}'."
            f"{nearest(unsupported, choices)}"
        )
    names = other_adapted(peft_model, adapter_name)
    if names and unsupported == "refuse":
        raise InputError(
            f"{len(names)} adapted layers are not plain linear layers, first '{names[0]}'; with "
            "unsupported='leave' they keep PEFT's own start."
        )
    return names


@contextmanager
def _alone(peft_model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Let no other adapter take part in the forward pass; afterwards those that did before.

    PEFT's ``set_adapter`` would also decide what is trained.
    """
    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    modules = [module for module in peft_model.modules() if isinstance(module, kinds)]
    modules = [module for module in modules if module.active_adapters != [adapter_name]]
    before = [module._active_adapter for module in modules]
    try:
        for module in modules:
            present = [name for name in module.active_adapters if name == adapter_name]
            module._active_adapter = present
        yield
    finally:
        for module, active in zip(modules, before, strict=True):
            module._active_adapter = active


def _agreed(starts: dict[str, Factors]) -> dict[str, Factors]:
    """Return rank 0's factors: equal gradients should give equal ones, this makes it certain.

    Once all layers are done, because collective operations need the same order on every rank.
    """
    ranks = together()
    if ranks is None:
        return starts
    return {
        name: factors._replace(
            B=ranks.agree(factors.B),
            A=ranks.agree(factors.A),
            clipped=float(ranks.agree(factors.B.new_tensor(factors.clipped))),
        )
        for name, factors in sorted(starts.items())
    }


def _finish(
    peft_model: PeftModel,
    layers: list[AdaptedLayer],
    starts: Mapping[str, Factors],
    options: Options,
    report: InitReport,
    reports: Mapping[str, LayerReport],
) -> None:
    start_adapter(peft_model, report.adapter_name, layers, starts, options)
    report.layers = [reports[layer.name] for layer in layers if layer.name in reports]
    if options.spec.uses_scale and options.scale == "stable":
        report.stable_gamma = options.stable_gamma


def _advise(report: InitReport) -> None:
    before, after = report.loss_before, report.loss_after
    if before is None or after is None:
        return
    falls = report.offset and after < 0.98 * before
    if math.isfinite(after) and after <= 1.02 * before and not falls:
        return
    if report.offset:
        smaller = "; raise stable_gamma for a smaller one" if report.stable_gamma else ""
        advice = (
            "it should leave the outputs alone. Either the base weights' dtype is too coarse for "
            f"the offset{smaller}, or the model uses the weight of an adapted layer without "
            "calling the layer, which has to be left out of the target modules"
        )
    elif report.stable_gamma:
        advice = "raise stable_gamma or lower the learning rate"
    elif report.scale is not None:
        advice = f"the scale '{report.scale}' makes too large a step here, choose 'stable'"
    else:
        advice = "check the base weights' dtype"
    report.warnings.append(
        f"the init batch's loss {'falls' if falls else 'rises'} from {before:.4f} to {after:.4f} "
        f"by the start alone; {advice}."
    )
