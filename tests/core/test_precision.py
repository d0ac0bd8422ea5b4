"""What the caller allows for a model's products does not reach the library's own."""

from contextlib import contextmanager

import pytest
import torch

from lora_one.adapters.write import subtract_offset
from lora_one.layers import adapted_layers
from lora_one.numerics.precision import full_precision
from lora_one.numerics.svd import truncated_svd
from lora_one.optimizers import lora_pairs
from lora_one.preconditioning import (
    _precondition_one_by_one,
    _precondition_stacked,
    precondition_pairs,
)

from .tiny import adapted, batches_for, perturb, tiny_llama

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@contextmanager
def allowing(how):
    """Allow products of fewer bits, by PyTorch's older call, its newer one, or autocast."""
    try:
        if how == "older":
            torch.set_float32_matmul_precision("medium")
        elif how == "newer":
            torch.backends.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = "none"
        for backend in BACKENDS:
            backend.fp32_precision = "none"


def precisions():
    return [torch.backends.fp32_precision, *(backend.fp32_precision for backend in BACKENDS)]


@pytest.mark.parametrize("how", ["older", "newer", "nothing"])
def test_fp32_is_fp32_inside_and_what_the_caller_allowed_outside(how):
    with allowing(how):
        before = precisions()
        with pytest.raises(KeyError), full_precision(torch.device("cpu")):
            assert not {"tf32", "bf16"} & {backend.fp32_precision for backend in BACKENDS}
            raise KeyError
        assert precisions() == before
        if how == "newer":  # the backends still follow the general setting
            torch.backends.fp32_precision = "none"
            assert {backend.fp32_precision for backend in BACKENDS} == {"none"}
        else:  # the older call can still be read, which PyTorch refuses where both disagree
            expected = {"older": "medium", "nothing": "highest"}[how]
            assert torch.get_float32_matmul_precision() == expected


@pytest.mark.parametrize("how", ["older", "autocast"])
def test_decompositions_offsets_and_preconditioned_gradients_keep_every_bit(how, monkeypatch):
    """On CPUs that multiply otherwise under ``medium``, with bf16 or by other code, bits tell."""

    def results():
        generator = torch.Generator().manual_seed(0)
        svd = truncated_svd(torch.randn(300, 200, generator=generator), 8)
        yield from svd[:3]
        layers = adapted_layers(model)
        for layer in layers:
            subtract_offset(layer)
            yield layer.module.weight.detach().clone()
        for on_cpu in (_precondition_one_by_one, _precondition_stacked):
            monkeypatch.setattr("lora_one.preconditioning._precondition_one_by_one", on_cpu)
            for factor, gradient in gradients:
                factor.grad = gradient.clone()
            precondition_pairs(pairs, 1e-6)
            yield from (factor.grad for factor, _ in gradients)

    gradients = []
    expected = None
    for choice in ("nothing", how):
        model = adapted(tiny_llama(hidden_size=256), r=8)
        perturb(model, size=0.1)
        model(**batches_for()[0]).loss.backward()
        pairs = list(lora_pairs(model).values())
        gradients = [(factor, factor.grad.clone()) for pair in pairs for factor in pair]
        with allowing(choice), torch.no_grad():
            found = list(results())
        expected = expected or found
    assert all(map(torch.equal, found, expected))
