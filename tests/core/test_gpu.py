"""What differs on a GPU: tensor-core sums, stacked pairs, device placement, 7 B shapes."""

import pytest
import torch

import lora_one
from lora_one.adapters.state import load_initial_state, save_initial_state
from lora_one.gradients.tap import weight_gradient
from lora_one.layers import adapted_layers
from lora_one.numerics.svd import truncated_svd
from lora_one.optimizers import lora_pairs
from lora_one.preconditioning import precondition_pairs

from .tiny import adapted, batches_for, known_spectrum, perturb, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["highest", "high"])
def allowed(request):
    """What the caller allows for products of fp32 matrices; ``high`` is TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_core_products_are_summed_in_fp32(dtype):
    x, g = (torch.randn(3, 500, n, device="cuda").to(dtype) for n in (64, 48))
    exact = torch.einsum("bti,btj->ij", g.double(), x.double())
    ours = weight_gradient(x, g)
    assert ours.dtype == torch.float32
    assert float((ours - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.usefixtures("allowed")
def test_decomposition_agrees_with_lapack():
    matrix, U, S, Vh = known_spectrum(600, 400, [1.1**-i for i in range(60)], dtype=torch.float32)
    found = truncated_svd(matrix.cuda(), 8)
    best = (U[:, :8] * S[:8]) @ Vh[:8]
    error = (found.U * found.S) @ found.Vh - best.cuda()
    assert float(error.norm() / best.norm()) < 1e-3


@pytest.mark.parametrize("method", ["lora_one", "lora_ga", "pissa", "eva", "corda"])
def test_start_on_gpu_equals_start_on_cpu(method, tmp_path):
    on_cpu, on_gpu = adapted(tiny_llama()), adapted(tiny_llama()).cuda()
    first = lora_one.initialize(on_cpu, batches_for(), method=method)
    second = lora_one.initialize(on_gpu, batches_for(), method=method)
    assert first.loss_after == pytest.approx(second.loss_after, rel=1e-3)
    save_initial_state(on_gpu, tmp_path / "start.safetensors")
    again = adapted(tiny_llama()).cuda()
    load_initial_state(again, tmp_path / "start.safetensors")
    for a, b in zip(on_gpu.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("allowed")
def test_stacked_pairs_equal_a_float64_solve():
    model = adapted(tiny_llama()).cuda()
    perturb_on_cpu = adapted(tiny_llama())
    perturb(perturb_on_cpu, size=0.1)
    model.load_state_dict(perturb_on_cpu.state_dict())
    batch = {key: value.cuda() for key, value in batches_for()[0].items()}
    model(**batch).loss.backward()
    expected = []
    for A, B in lora_pairs(model).values():
        a, b, g_a, g_b = (t.detach().double() for t in (A, B, A.grad, B.grad))
        eye = torch.eye(len(a), dtype=torch.float64, device="cuda")
        expected.append(torch.linalg.solve(b.T @ b + 1e-3 * eye, g_a))
        expected.append(torch.linalg.solve(a @ a.T + 1e-3 * eye, g_b, left=False))
    pairs = list(lora_pairs(model).values())
    precondition_pairs(pairs, 1e-3)
    ours = [factor.grad for pair in pairs for factor in pair]
    for gradient, exact in zip(ours, expected, strict=True):
        assert float((gradient - exact).norm() / exact.norm()) < 1e-4


def test_an_adapter_on_another_device_than_its_layer_is_refused():
    peft_model = adapted(tiny_llama())
    adapted_layers(peft_model)[0].peft_layer.lora_A.cuda()
    with pytest.raises(lora_one.InputError, match=r"different devices \(cpu, cuda:0\)"):
        lora_one.initialize(peft_model, batches_for(), method="lora_one")


def test_a_large_vocabulary_costs_no_memory():
    model = adapted(tiny_llama(vocab_size=60_000)).cuda()
    batches = batches_for(rows=(64,), length=64)
    logits = 64 * 64 * 60_000 * 4
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lora_one.initialize(model, batches, method="lora_one")
    assert torch.cuda.max_memory_allocated() - before < logits / 4
