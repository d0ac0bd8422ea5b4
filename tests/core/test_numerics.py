"""Theorems about the pure functions: decomposition, factors, preconditioner, angles."""

import math

import pytest
import torch

from lora_one.numerics.angles import principal_angles
from lora_one.numerics.factors import Factors, Layer, clip_to_weight
from lora_one.numerics.methods import METHODS
from lora_one.numerics.preconditioner import damped_gram_factor, precondition
from lora_one.numerics.svd import private_generator, subspace_error, truncated_svd

from .tiny import known_spectrum


def problem(method="lora_one", m=40, n=30, r=4, s=2.0, **options):
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(m, n, generator=generator) / math.sqrt(n)
    G, *_ = known_spectrum(m, n, [2.0**-i for i in range(12)], dtype=torch.float32)
    X = torch.randn(3 * n, n, generator=generator) * torch.linspace(0.1, 1, n)
    layer = Layer(m=m, n=n, r=r, s=s, W=W, G=G, C=X.T @ X / len(X), name="layer", **options)
    return layer, METHODS[method].function(layer)


def relative(difference, reference):
    return float(difference.norm() / reference.norm())


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (60, 50)])
@pytest.mark.parametrize("rank", [1, 8])
def test_best_rank_r_part_is_found(shape, rank):
    values = [1.1 ** -(3 * i) for i in range(40)]
    matrix, U, S, Vh = known_spectrum(*shape, values, dtype=torch.float32)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    found = truncated_svd(matrix, rank, generator=private_generator(3))
    assert relative((found.U * found.S) @ found.Vh - best, best) < 1e-3  # the promise
    torch.testing.assert_close(found.S.double(), S[:rank], rtol=1e-5, atol=0)
    assert found.next_value == pytest.approx(values[rank], rel=1e-2)
    for factor in (found.U, found.Vh.T):
        torch.testing.assert_close(factor.T @ factor, torch.eye(rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(512, 512), (300, 900), (900, 300)])
@pytest.mark.parametrize("gap", [1.06, 1.5])
def test_randomised_svd_keeps_its_promise_on_a_flat_noisy_spectrum(shape, gap):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(noise, full_matrices=False)
    S[:8] = S[8] * gap * torch.linspace(1.3, 1.0, 8)  # then hundreds of values close to each other
    best = (U[:, :8] * S[:8]) @ Vh[:8]
    found = truncated_svd(((U * S) @ Vh).float(), 8)
    error = relative((found.U * found.S) @ found.Vh - best, best)
    assert error < 1e-3
    assert error < 2 * found.error + 1e-5  # the stated error bounds the real one


@pytest.mark.parametrize("gap", [0.08, 0.5])
def test_subspace_error_is_the_angle_to_first_order(gap):
    """On ``M Mᵀ = [[diag(σ²), Cᵀ], [C, σ_out² I]]``, whose leading eigenvectors LAPACK knows."""
    r, k, b = 4, 24, 8
    S = torch.cat([torch.linspace(1.5, 1.0, r), torch.linspace(1 - gap, 0.2, k - r)]).double()
    C = 1e-4 * torch.randn(b, k, generator=private_generator(1), dtype=torch.float64)
    C[:, r] *= 2e2  # the next Ritz vector has not settled yet and leads out of the basis
    gram = torch.diag(torch.cat([S.square(), S[k // 4].square().expand(b)]))
    gram[k:, :k], gram[:k, k:] = C, C.T
    leading = torch.linalg.eigh(gram).eigenvectors[:, -r:]
    sines = (1 - torch.linalg.svdvals(leading[:r]).square()).clamp(min=0).sqrt()
    estimate = subspace_error(S.numpy(), C.numpy(), r)
    assert estimate == pytest.approx(float(sines.square().mean().sqrt()), rel=2e-3)


def test_small_singular_values_beside_a_huge_one_are_found():
    values = [1e4, *[1.2**-i for i in range(30)]]
    matrix, U, S, _ = known_spectrum(300, 300, values, dtype=torch.float32)
    found = truncated_svd(matrix, 8)
    # fp32 knows the matrix to 1e4 * 6e-8 = 6e-4 absolutely.
    torch.testing.assert_close(found.S.double(), S[:8], rtol=1e-3, atol=1e-3)
    product = found.U[:, 1:].T.double() @ U[:, 1:8]
    assert float(torch.linalg.svdvals(product).min()) > 0.99


def test_decomposition_is_repeatable_and_leaves_the_global_generator_alone():
    matrix = torch.randn(200, 150, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    first = truncated_svd(matrix, 5, generator=private_generator(0, "q"))
    torch.randn(3)
    second = truncated_svd(matrix, 5, generator=private_generator(0, "q"))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    torch.set_rng_state(before)
    truncated_svd(matrix, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(90, 60), (200, 150), (150, 200)])
def test_signs_belong_to_the_matrix_and_not_to_the_way_it_is_decomposed(shape):
    """Rows in another order, or all negated, change U accordingly and nothing else."""
    values = [1.2**-i for i in range(40)]
    matrix, *_ = known_spectrum(*shape, values, dtype=torch.float32)
    svd = truncated_svd(matrix, 6)
    for seed in range(4):
        order = torch.randperm(shape[0], generator=private_generator(seed))
        moved = truncated_svd(-matrix[order], 6, generator=private_generator(seed))
        torch.testing.assert_close(moved.Vh, svd.Vh, atol=2e-3, rtol=0)
        torch.testing.assert_close(moved.U, -svd.U[order], atol=2e-3, rtol=0)


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_a_matrix_of_any_size_is_decomposed_as_well(exponent):
    matrix, U, S, Vh = known_spectrum(200, 150, [1.3**-i for i in range(40)])
    found = truncated_svd((matrix * 2.0**exponent).float(), 6)
    values = found.S.double() * 2.0**-exponent
    torch.testing.assert_close(values, S[:6], rtol=1e-5, atol=0)
    assert found.next_value * 2.0**-exponent == pytest.approx(float(S[6]), rel=1e-2)
    best = (U[:, :6] * S[:6]) @ Vh[:6]
    assert relative((found.U * values) @ found.Vh.double() - best, best) < 1e-3


def test_zero_and_rank_deficient_matrices_decompose():
    U, S, Vh, *_ = truncated_svd(torch.zeros(200, 150), 4)
    assert S.abs().max() == 0
    assert torch.isfinite(U).all()
    assert torch.isfinite(Vh).all()
    matrix, *_ = known_spectrum(200, 150, [3.0, 1.0], dtype=torch.float32)
    U, S, Vh, *_ = truncated_svd(matrix, 4)
    assert relative((U * S) @ Vh - matrix, matrix) < 1e-5
    assert S[2] < 1e-5
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("directions", [3, 8, 20, 27])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_gradient_of_few_tokens_has_few_directions_and_is_decomposed_to_rounding(
    directions, noise
):
    """Fewer than two blocks of 16: the basis outgrows the matrix."""
    matrix, U, S, Vh = known_spectrum(512, 600, [0.9**i for i in range(directions)])
    matrix = (matrix + noise * torch.randn(512, 600, dtype=torch.float64)).float()
    found = truncated_svd(matrix, 8)
    kept = min(8, directions)
    best = (U[:, :kept] * S[:kept]) @ Vh[:kept]
    assert relative((found.U * found.S) @ found.Vh - best, best) < 1e-4
    torch.testing.assert_close(found.S[:kept].double(), S[:kept], rtol=1e-5, atol=0)
    for factor in (found.U, found.Vh.T):
        torch.testing.assert_close(factor.T @ factor, torch.eye(8), atol=1e-4, rtol=0)


@pytest.mark.parametrize("entries", [1, 6, 40])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_where_most_rows_or_columns_are_zero_rounding_errors_are_not_taken_for_directions(
    entries, shape
):
    """As where few units or inputs of a layer are active: errors lie where entries lie."""
    matrix = torch.zeros(shape)
    generator = torch.Generator().manual_seed(0)
    matrix[:entries] = torch.randn(entries, shape[1], generator=generator)
    for M in (matrix, matrix.T.flip(0)):
        found = truncated_svd(M, 8)
        U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
        best = (U[:, :8] * S[:8]) @ Vh[:8]
        assert relative((found.U * found.S) @ found.Vh - best, best) < 1e-3
        torch.testing.assert_close(found.S.double(), S[:8], rtol=1e-4, atol=1e-4)
        for factor in (found.U, found.Vh.T):
            torch.testing.assert_close(factor.T @ factor, torch.eye(8), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank", [0, 31])
def test_impossible_rank_is_refused(rank):
    with pytest.raises(ValueError, match="between 1 and 30"):
        truncated_svd(torch.zeros(40, 30), rank)


@pytest.mark.parametrize(
    ("scale", "multiple"),
    [
        ("stable", lambda s, gamma, S, w: s / (gamma * S)),
        ("unit", lambda s, gamma, S, w: s / S),
        ("gd", lambda s, gamma, S, w: 1 / (s * S)),
        ("weightS", lambda s, gamma, S, w: s * w**2 / S),
    ],
)
def test_lora_one_starts_at_the_stated_multiple_of_the_best_rank_r_part(scale, multiple):
    layer, factors = problem("lora_one", scale=scale, gamma=16.0)
    U, S, Vh = torch.linalg.svd(-layer.G)
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    w = float((torch.linalg.svdvals(layer.W)[:4] / layer.s).sqrt().mean())
    expected = multiple(layer.s, 16.0, float(S[0]), w) * best
    assert relative(layer.s * factors.B @ factors.A - expected, expected) < 1e-5
    # Balanced: both factors share the root of the singular values.
    torch.testing.assert_close(factors.B.T @ factors.B, factors.A @ factors.A.T, atol=1e-6, rtol=0)


def test_lora_ga_takes_the_top_right_and_the_next_left_singular_vectors():
    layer, factors = problem("lora_ga", gamma=16.0)
    U, _, Vh = torch.linalg.svd(-layer.G)
    size = 40**0.25 / math.sqrt(16.0)
    # Singular vectors have free signs, so projectors are compared.
    for ours, exact in ((factors.B, U[:, 4:8]), (factors.A.T, Vh[:4].T)):
        torch.testing.assert_close(ours @ ours.T, size**2 * exact @ exact.T, atol=1e-4, rtol=0)


def test_pissa_residual_has_the_next_singular_value_as_its_norm():
    layer, factors = problem("pissa")
    residual = layer.W - layer.s * factors.B @ factors.A
    expected = torch.linalg.svdvals(layer.W)[4]
    torch.testing.assert_close(torch.linalg.matrix_norm(residual, 2), expected)
    assert factors.svd.next_value == pytest.approx(float(expected))


def test_olora_factors_are_the_leading_part_of_qr():
    layer, factors = problem("olora")
    Q, R = torch.linalg.qr(layer.W)
    torch.testing.assert_close(factors.B @ factors.A, Q[:, :4] @ R[:4])


def test_simple_starts_have_the_stated_size():
    m, n, r = 900, 700, 64
    layer = Layer(m=m, n=n, r=r, s=2.0, gamma=16.0, name="x")
    b, a = m**0.25 / 4, n**0.25 / 4
    deviations = {
        "gaussian": (b / m**0.5, a / n**0.5),
        "kaiming": (b * (2 / r) ** 0.5, a / (3 * n) ** 0.5),
        "orthogonal": (b / m**0.5, a / n**0.5),
        "lora": (0.0, 1 / (3 * n) ** 0.5),
    }
    for method, (std_B, std_A) in deviations.items():
        factors = METHODS[method].function(layer)
        # 3 % is four standard errors of a deviation estimated from 45 000 entries.
        assert float(factors.B.std()) == pytest.approx(std_B, rel=0.03)
        assert float(factors.A.std()) == pytest.approx(std_A, rel=0.03)
    B = METHODS["orthogonal"].function(layer).B
    torch.testing.assert_close(B.T @ B, b**2 * torch.eye(r), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_factors_depend_on_seed_and_name_only(method):
    layer, first = problem(method)
    torch.randn(5)
    _, second = problem(method)
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)
    assert first.B.shape == (layer.m, layer.r)
    assert first.A.shape == (layer.r, layer.n)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_states_its_equation_and_source(method):
    assert "B" in METHODS[method].equation
    assert METHODS[method].source


def test_clipping_bounds_the_update_by_the_weight_and_else_changes_nothing():
    W = torch.full((6, 5), 0.5)
    factors = Factors(torch.ones(6, 2), torch.ones(2, 5))
    clipped = clip_to_weight(factors, W, s=3.0)
    assert float((3.0 * clipped.B @ clipped.A).abs().max()) == pytest.approx(0.5)
    small = Factors(0.01 * factors.B, factors.A)
    assert torch.equal(clip_to_weight(small, W, s=3.0).B, small.B)
    zero = Factors(torch.zeros(6, 2), factors.A)
    for weight in (W, torch.zeros_like(W)):
        assert torch.equal(clip_to_weight(zero, weight, s=3.0).A, zero.A)


def pair(m=50, n=40, r=4, batch=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, r, n), (batch, m, r), (batch, r, n), (batch, m, r)]
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relative_damping", [False, True])
def test_preconditioner_equals_a_float64_solve(dtype, relative_damping):
    A, B, g_A, g_B = pair(dtype=dtype)
    new_A, new_B = precondition(A, B, g_A, g_B, 1e-2, relative=relative_damping)
    A, B, g_A, g_B = (t.double() for t in (A, B, g_A, g_B))
    P_A, P_B = B.mT @ B, A @ A.mT
    d_A, d_B = (
        (1e-2 * P.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] if relative_damping else 1e-2)
        for P in (P_A, P_B)
    )
    eye = torch.eye(4, dtype=torch.float64)
    # Factors of any dtype are used as they are, so only fp32's own rounding is left.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for new, exact in (
        (new_A, torch.linalg.solve(P_A + d_A * eye, g_A)),
        (new_B, torch.linalg.solve(P_B + d_B * eye, g_B, left=False)),
    ):
        assert relative(new.double() - exact, exact) < tolerance


@pytest.mark.parametrize("size", [1.0, 1e-10, 1e-16])
def test_relative_damping_does_not_depend_on_the_size_of_the_factors(size):
    A, B, g_A, g_B = pair(dtype=torch.float32)
    small_A, small_B = size * A, size * B
    new_A, new_B = precondition(small_A, small_B, g_A, g_B, 1e-6, relative=True)
    A, B = small_A.double(), small_B.double()
    eye = torch.eye(4, dtype=torch.float64)
    for new, P, solve in (
        (new_A, B.mT @ B, lambda P: torch.linalg.solve(P, g_A.double())),
        (new_B, A @ A.mT, lambda P: torch.linalg.solve(P, g_B.double(), left=False)),
    ):
        d = 1e-6 * P.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        exact = solve(P + d * eye)
        assert relative(new.double() - exact, exact) < 1e-5


def test_undamped_step_is_invariant_in_the_product():
    """With d = 0, ``B dA + dB A`` is the same for (B, A) and (B R, R⁻¹ A)."""
    A, B, *_ = pair(batch=1)
    R = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    G = torch.randn(1, 50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    changes = []
    for B_, A_ in ((B, A), (B @ R, torch.linalg.solve(R, A[0])[None])):
        new_A, new_B = precondition(A_, B_, B_.mT @ G, G @ A_.mT, 0.0)
        changes.append(B_ @ new_A + new_B @ A_)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-9, atol=1e-9)


def test_zero_factor_divides_by_the_damping():
    A, B, g_A, g_B = pair(dtype=torch.float32)
    new_A, _ = precondition(A, torch.zeros_like(B), g_A, g_B, 1e-3)
    torch.testing.assert_close(new_A, g_A / 1e-3)
    zero_gradient, _ = precondition(A, 0 * B, 0 * g_A, g_B, 1e-6, relative=True)
    assert zero_gradient.abs().max() == 0


def test_rank_deficient_factor_falls_back_instead_of_failing():
    A, B, g_A, g_B = pair(dtype=torch.float32)
    B[1] = 100 * B[1, :, :1]  # rank one: rounding makes its Gram matrix indefinite
    new_A, new_B = precondition(A, B, g_A, g_B, 1e-12)
    assert torch.isfinite(new_A).all()
    assert torch.isfinite(new_B).all()
    alone, _ = precondition(A[:1], B[:1], g_A[:1], g_B[:1], 1e-12)
    torch.testing.assert_close(new_A[:1], alone)  # healthy neighbours are not touched


def test_fallback_adds_damping_only_to_failed_matrices():
    good, bad = torch.eye(3), torch.tensor([[1.0, 1, 0], [1, 1 - 1e-6, 0], [0, 0, 1]])
    L = damped_gram_factor(torch.stack([good, bad]), 0.0)
    assert torch.equal(L[0], good)
    assert torch.isfinite(L[1]).all()


def test_principal_angles_of_known_planes():
    X = torch.eye(4, 2)
    Y = torch.tensor([[1.0, 0], [0, math.cos(0.3)], [0, math.sin(0.3)], [0, 0]])
    torch.testing.assert_close(
        principal_angles(X, Y @ torch.tensor([[2.0, 1], [0, 1]])), torch.tensor([0, 0.3])
    )
    tiny = torch.tensor([[1.0], [1e-6], [0.0]])
    angle = principal_angles(torch.eye(3, 1), tiny)
    torch.testing.assert_close(angle, torch.tensor([1e-6]))  # acos alone would return 0
    line = principal_angles(torch.eye(3, 2), torch.tensor([[0.0], [0.0], [2.0]]))
    torch.testing.assert_close(line, torch.tensor([math.pi / 2]))
    with pytest.raises(ValueError, match="equally many rows"):
        principal_angles(torch.eye(3), torch.eye(4))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_equation_and_its_source(name):
    method = METHODS[name]
    assert "B" in method.equation
    assert method.source
    assert method.source.count("(") == method.source.count(")")
