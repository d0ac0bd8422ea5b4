"""Theorems about gradients that are decomposed from the tokens' vectors and never formed."""

import pytest
import torch

import lora_one
from lora_one.gradients import stream
from lora_one.numerics.outer_products import OuterProducts
from lora_one.numerics.svd import cheaper_unformed, truncated_svd

from .tiny import adapted, batches_for, known_spectrum, tiny_llama

TOKENS = 700


def sum_of_outer_products(m=600, n=500, size=1.0, seed=0):
    """Vectors whose sum of outer products has the spectrum ``0.8^i``, and that sum in fp64."""
    M, *_ = known_spectrum(m, n, [0.8**i for i in range(80)], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(TOKENS, n, generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(basis).Q
    g = x @ M.T
    return OuterProducts((size * g).float(), x.float()), size * M


def best_part(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def part_of(svd):
    return (svd.U * svd.S).double() @ svd.Vh.double()


@torch.no_grad()
def relative(difference, reference):
    return float(difference.norm() / reference.norm())


def wide_llama(**changes):
    """q_proj (640 x 640) and down_proj (640 x 768) are wide enough, v_proj (160 x 640) is not."""
    sizes = {"hidden_size": 640, "intermediate_size": 768, "num_key_value_heads": 1}
    return tiny_llama(**{**sizes, "num_hidden_layers": 1, **changes})


@pytest.fixture
def formed(monkeypatch):
    """Shapes of the gradients that were formed."""
    shapes = []
    weight_gradient = stream.weight_gradient

    def watched(x, grad_output):
        shapes.append((grad_output.shape[-1], x.shape[-1]))
        return weight_gradient(x, grad_output)

    monkeypatch.setattr(stream, "weight_gradient", watched)
    return shapes


def test_products_are_those_of_the_sum():
    products, M = sum_of_outer_products()
    X, Y = torch.randn(500, 16), torch.randn(600, 16)
    assert products.shape == (600, 500)
    assert relative((products @ X).double() - M @ X.double(), M @ X.double()) < 1e-5
    assert relative((products.mT @ Y).double() - M.T @ Y.double(), M.T @ Y.double()) < 1e-5
    assert relative((products / 8).form().double() - M / 8, M / 8) < 1e-6
    torch.testing.assert_close((products / 8).mT @ Y, (products.mT @ Y) / 8)


@pytest.mark.parametrize("shape", [(600, 500), (500, 600), (100, 400)])
def test_the_decomposition_is_that_of_the_formed_matrix(shape):
    products, M = sum_of_outer_products(*shape)
    found, of_formed = truncated_svd(products, 8), truncated_svd(products.form(), 8)
    assert relative(part_of(found) - best_part(M, 8), best_part(M, 8)) < 1e-3
    assert relative(part_of(found) - part_of(of_formed), part_of(of_formed)) < 1e-4
    torch.testing.assert_close(found.S, of_formed.S, rtol=1e-5, atol=0)
    assert found.next_value == pytest.approx(of_formed.next_value, rel=1e-2)


@pytest.mark.parametrize(
    "values",
    [
        [0.5**i for i in range(60)],
        [0.9**i for i in range(300)],
        [0.98**i for i in range(300)],
        [1.0] * 8 + [0.5 - 1e-4 * i for i in range(300)],  # a cluster that the basis sees in part
        [1.0] * 8 + [0.94] * 300,
    ],
    ids=["0.5^i", "0.9^i", "0.98^i", "cluster", "step"],
)
def test_the_norm_is_known_without_the_matrix(values):
    errors = []
    for seed in range(6):
        M, *_ = known_spectrum(600, 500, values, seed=seed)
        products = OuterProducts(M.T.float().contiguous(), torch.eye(500))
        errors.append(truncated_svd(products, 8).norm / float(M.norm()) - 1)
    assert max(map(abs, errors)) < 0.03
    assert abs(sum(errors) / len(errors)) < 0.015, "not biased"


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_products_near_the_ends_of_fp32_are_no_infinities(shape, size):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found, S = truncated_svd(matrix * size, 4), torch.linalg.svdvals(matrix)[:4]
    torch.testing.assert_close(found.S / size, S, rtol=1e-3, atol=0)


@pytest.mark.parametrize("exponent", [-80, 80])
def test_a_sum_of_any_size_is_decomposed_as_well(exponent):
    products, scaled = sum_of_outer_products(size=2.0**exponent)
    found, M = truncated_svd(products, 8), scaled * 2.0**-exponent
    found = found._replace(S=found.S * 2.0**-exponent)
    assert relative(part_of(found) - best_part(M, 8), best_part(M, 8)) < 1e-3
    assert found.norm * 2.0**-exponent == pytest.approx(float(M.norm()), rel=0.02)


def test_once_products_have_cost_as_much_the_matrix_is_formed(monkeypatch):
    calls = []
    form = OuterProducts.form
    monkeypatch.setattr(OuterProducts, "form", lambda self: calls.append(1) or form(self))
    truncated_svd(sum_of_outer_products()[0], 8)
    assert calls == [], "80 columns of 500 are enough here"
    flat = torch.randn(500, 600, generator=torch.Generator().manual_seed(0))
    products = OuterProducts(flat.T.contiguous(), torch.eye(600))
    found = truncated_svd(products, 8)
    assert calls == [1]
    assert found.norm == pytest.approx(float(flat.norm()), rel=0.03)


def test_a_zero_sum_has_norm_zero_and_a_sum_that_is_not_finite_is_refused():
    assert truncated_svd(OuterProducts(torch.zeros(9, 300), torch.randn(9, 200)), 4).norm == 0
    for bad in (float("nan"), float("inf")):
        for width in (200, 20):  # by iteration, by LAPACK
            g = torch.ones(9, 300)
            g[4, 17] = bad
            with pytest.raises(FloatingPointError, match="not finite"):
                truncated_svd(OuterProducts(g, torch.ones(9, width)), 4)


@pytest.mark.parametrize("method", ["lora_one", "lora_ga"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_start_is_that_of_the_formed_gradient(method, checkpointing, formed):
    model = wide_llama()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batches = batches_for()[:1]
    reference = adapted(model)
    gradients = lora_one.estimate_gradients(reference, batches)
    expected = lora_one.initialize_adapters(reference, gradients, method=method)
    formed.clear()
    peft_model = adapted(model)
    report = lora_one.initialize(peft_model, batches, method=method)
    assert set(formed) == {(160, 640)}, "only the narrow layer's gradient is formed"
    for ours, theirs in zip(report.layers, expected.layers, strict=True):
        assert ours.captured_energy == pytest.approx(theirs.captured_energy, rel=0.05)
        assert ours.singular_values == pytest.approx(theirs.singular_values, rel=1e-3)
    for module, other in zip(peft_model.modules(), reference.modules(), strict=True):
        if hasattr(module, "lora_A"):
            ours, theirs = (x.get_delta_weight("default").double() for x in (module, other))
            assert relative(ours - theirs, theirs) < 1e-3


def test_a_layer_that_runs_twice_is_formed(formed):
    model = wide_llama(num_hidden_layers=2)
    first, second = model.model.layers
    second.self_attn.q_proj = first.self_attn.q_proj
    peft_model = adapted(model, targets=("q_proj",))
    lora_one.initialize(peft_model, batches_for()[:1], method="lora_one", measure_loss=False)
    assert formed == [(640, 640)] * 2


def test_several_micro_batches_are_added_up_formed_and_joined_ones_are_not(formed):
    for strategy, expected in (("hold", {(640, 640)}), ("join", set())):
        formed.clear()
        peft_model = adapted(wide_llama(), targets=("q_proj",))
        lora_one.initialize(peft_model, batches_for(), method="lora_one", strategy=strategy)
        assert set(formed) == expected


def test_a_wide_layer_without_a_gradient_keeps_its_start_and_one_that_is_not_finite_is_named():
    model = wide_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    peft_model = adapted(model, targets=("q_proj", "down_proj"))
    report = lora_one.initialize(peft_model, batches_for()[:1], method="lora_one")
    assert report.left_to_peft == ["model.layers.0.self_attn.q_proj"]
    assert "the gradient of 'model.layers.0.self_attn.q_proj' is zero" in report.warnings[0]

    def spoil(module, grad_input, grad_output):
        return (grad_input[0] * float("nan"),)

    peft_model = adapted(wide_llama(), targets=("q_proj", "down_proj"))
    layer = peft_model.get_base_model().model.layers[0]
    layer.self_attn.o_proj.register_full_backward_hook(spoil)
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    with pytest.raises(lora_one.NonFiniteError, match=r"'model\.layers\.0\.self_attn\.q_proj'"):
        lora_one.initialize(peft_model, batches_for()[:1], method="lora_one")
    assert all(torch.equal(value, before[name]) for name, value in peft_model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_vectors_of_any_dtype_are_multiplied_in_fp32_or_wider(dtype):
    model = wide_llama().to(dtype)
    batches = batches_for()[:1]
    reference = adapted(model, targets=("q_proj",))
    gradients = lora_one.estimate_gradients(reference, batches)
    peft_model = adapted(model, targets=("q_proj",))
    report = lora_one.initialize(peft_model, batches, method="lora_one")
    (G,) = gradients.values()
    S = torch.linalg.svdvals(G.double())[:4]
    assert report.layers[0].singular_values == pytest.approx(S.tolist(), rel=1e-4)


def test_ranks_are_allocated_from_unformed_gradients_as_from_formed_ones(formed):
    model, targets = wide_llama(), ["q_proj", "down_proj"]
    whole = batches_for()[:1]
    options = {"rank": 1, "target_modules": targets, "method": "lora_one"}
    found = lora_one.allocate_ranks(model, whole, **options)
    assert formed == []
    rows = [{key: value[i : i + 1] for key, value in whole[0].items()} for i in range(3)]
    same = lora_one.allocate_ranks(model, rows, strategy="hold", **options)
    assert formed
    assert found.parameters == same.parameters
    assert found.ranks == same.ranks
    assert found.captured_energy == pytest.approx(same.captured_energy, rel=0.05)


def test_what_is_cheaper_follows_from_the_operations():
    assert cheaper_unformed(4096, 4096, 8)
    assert cheaper_unformed(1376, 512, 8)
    assert not cheaper_unformed(1376, 512, 64)
    assert not cheaper_unformed(256, 256, 8)
    assert not cheaper_unformed(128, 100_000, 8)
