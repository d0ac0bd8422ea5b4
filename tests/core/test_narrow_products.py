"""What a C compiler makes of the preconditioner's products on a CPU is what PyTorch computes."""

import logging
import os
import shutil
import signal

import pytest
import torch
from torch import nn

from lora_one import narrow_products
from lora_one.narrow_products import SOURCE, NarrowProducts, fit
from lora_one.numerics.preconditioner import precondition
from lora_one.preconditioning import precondition_pairs

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

# Whole and broken chunks of the longer side, and the shortest sides.
SHAPES = [(512, 1024), (4, 8), (516, 1032), (1020, 504)]
DAMPING = 1.0


@pytest.fixture
def compiled(monkeypatch):
    """Take pairs of any size to be worth compiling; return the numbers of pairs that were."""
    counts = []
    multiply = NarrowProducts.multiply

    def counted(self, pairs, *matrices):
        counts.append(len(pairs))
        multiply(self, pairs, *matrices)

    monkeypatch.setattr(NarrowProducts, "multiply", counted)
    monkeypatch.setattr(narrow_products, "WORTH_COMPILING", 0)
    return counts


def pairs_of(r, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(r)
    pairs = []
    for m, n in shapes:
        A, B = (
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in ((r, n), (m, r))
        )
        for factor in (A, B):
            factor.grad = torch.randn(factor.shape, generator=generator).to(dtype)
        pairs.append((A, B))
    return pairs


def preconditioned(pairs):
    """Return the gradients after ``precondition_pairs``; the old ones are put back."""
    before = [[factor.grad.clone() for factor in pair] for pair in pairs]
    precondition_pairs(pairs, DAMPING)
    after = [[factor.grad for factor in pair] for pair in pairs]
    for pair, gradients in zip(pairs, before, strict=True):
        for factor, gradient in zip(pair, gradients, strict=True):
            factor.grad = gradient
    return after


@needs_a_compiler
@pytest.mark.parametrize("r", [8, 16, 24, 32])
def test_equals_a_float64_solve_for_every_shape(r, compiled):
    pairs = pairs_of(r)
    expected = [
        precondition(*(t.detach().double() for t in (A, B, A.grad, B.grad)), damping=DAMPING)
        for A, B in pairs
    ]
    for found, exact in zip(preconditioned(pairs), expected, strict=True):
        for gradient, reference in zip(found, exact, strict=True):
            assert (gradient - reference).norm() < 2e-5 * reference.norm()
    assert compiled == [len(SHAPES)]


@needs_a_compiler
def test_differs_from_pytorchs_products_by_rounding_only(compiled, monkeypatch):
    pairs = pairs_of(8, [(512, 1024), (516, 1032)])
    found = preconditioned(pairs)
    monkeypatch.setattr(narrow_products, "WORTH_COMPILING", 2**40)
    for ours, theirs in zip(found, preconditioned(pairs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert compiled == [2]


@needs_a_compiler
def test_the_number_of_threads_changes_no_bit(compiled):
    pairs = pairs_of(8, 5 * SHAPES)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(preconditioned(pairs))
    torch.set_num_threads(1)
    assert all(
        torch.equal(one, two)
        for alone, shared in zip(*found, strict=True)
        for one, two in zip(alone, shared, strict=True)
    )
    assert compiled == [20, 20]


@needs_a_compiler
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_no_bit(default, compiled):
    pairs = pairs_of(8, [(64, 64)])
    ((expected_A, expected_B),) = preconditioned(pairs)
    torch.set_default_dtype(default)
    try:
        ((grad_A, grad_B),) = preconditioned(pairs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(grad_A, expected_A) and torch.equal(grad_B, expected_B)
    assert compiled == [1, 1]


@needs_a_compiler
def test_a_gradient_that_is_not_finite_is_not_made_finite(compiled):
    pairs = pairs_of(8, [(512, 1024)])
    (A, B), *_ = pairs
    A.grad[3, 5], B.grad[7, 2] = float("nan"), float("inf")
    ((grad_A, grad_B),) = preconditioned(pairs)
    assert grad_A[:, 5].isnan().all() and not grad_B[7].isfinite().any()
    assert grad_A.isfinite().sum() == 8 * 1023 and grad_B.isfinite().sum() == 8 * 511
    with torch.no_grad():
        B[9, 4] = float("nan")
    ((grad_A, _),) = preconditioned(pairs)
    assert grad_A.isnan().all()
    assert compiled == [1, 1]


@needs_a_compiler
def test_a_missing_gradient_stays_missing_and_the_other_is_the_same(compiled):
    pairs = pairs_of(8, [(512, 1024), (64, 64)])
    (expected_A, _), (_, expected_B) = preconditioned(pairs)
    pairs[0][1].grad = pairs[1][0].grad = None
    precondition_pairs(pairs, DAMPING)
    assert torch.equal(pairs[0][0].grad, expected_A) and torch.equal(pairs[1][1].grad, expected_B)
    assert pairs[0][1].grad is None and pairs[1][0].grad is None


def test_other_ranks_shapes_dtypes_and_layouts_are_left_to_pytorch(compiled):
    others = [
        *pairs_of(12, [(512, 1024)]),
        *pairs_of(64, [(512, 1024)]),
        *pairs_of(8, [(510, 1024), (512, 1020)]),
        *pairs_of(8, [(512, 1024)], dtype=torch.bfloat16),
        *pairs_of(8, [(512, 1024)]),
    ]
    *_, (A, _) = others
    A.grad = A.grad.T.contiguous().T
    assert not any(fit(*pair) for pair in others)
    precondition_pairs(others, DAMPING)
    assert compiled == []


@needs_a_compiler
def test_a_process_forked_while_compiling_compiles_for_itself(compiled, monkeypatch, tmp_path):
    slow = tmp_path / "slow-cc"
    slow.write_text('#!/bin/sh\nsleep 0.5\nexec cc "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    narrow_products._compiled.cache_clear()
    pairs = pairs_of(8)
    narrow_products.start_compiling(pairs)
    child = os.fork()
    if not child:
        signal.alarm(30)
        os._exit(0 if narrow_products.narrow_products(pairs) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert narrow_products.narrow_products(pairs)
    narrow_products._compiled.cache_clear()


def test_without_a_compiler_pytorch_multiplies_and_the_reason_is_logged(
    compiled, monkeypatch, caplog, tmp_path
):
    pairs = pairs_of(8)
    monkeypatch.setattr(narrow_products, "WORTH_COMPILING", 2**40)
    expected = preconditioned(pairs)
    monkeypatch.setattr(narrow_products, "WORTH_COMPILING", 0)
    broken = tmp_path / "broken.c"
    broken.write_text("not C")
    for compiler, source, reason in [
        (str(tmp_path / "no-such-cc"), SOURCE, "no-such-cc"),
        ("cc -DX='", SOURCE, "No closing quotation"),
        ("cc", broken, "broken.c" if shutil.which("cc") else "cc"),
    ]:
        narrow_products._compiled.cache_clear()
        monkeypatch.setenv("CC", compiler)
        monkeypatch.setattr(narrow_products, "SOURCE", source)
        with caplog.at_level(logging.INFO, narrow_products.log.name):
            found = preconditioned(pairs)
        assert reason in caplog.text
        assert all(
            torch.equal(a, b)
            for x, y in zip(found, expected, strict=True)
            for a, b in zip(x, y, strict=True)
        )
    narrow_products._compiled.cache_clear()
    assert compiled == []
