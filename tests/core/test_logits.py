"""The loss takes the logits by chunks, and nobody can tell but by the memory."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lora_one
from lora_one.gradients import logits
from lora_one.gradients.logits import PromisedLogits, promise, promised_logits
from lora_one.gradients.restore import left_as_found

from .tiny import SIZES, VOCABULARY, adapted, batches_for, tiny_gpt2, tiny_llama, tiny_t5


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


class FusedLoss(torch.autograd.Function):
    """Cross-entropy as fused kernels have it: Python sees the logits in the forward pass only."""

    @staticmethod
    def forward(ctx, logits, target):
        counted = target != -100
        target = target.clamp(min=0)[:, None]
        ctx.save_for_backward(logits, target, counted)
        return -logits.log_softmax(-1).gather(1, target)[counted].sum()

    @staticmethod
    def backward(ctx, grad_output):
        logits, target, counted = ctx.saved_tensors
        gradient = logits.softmax(-1).scatter_add(1, target, -torch.ones(len(target), 1))
        return gradient * counted[:, None] * grad_output, None


def after_a_metric(z, y):
    with torch.no_grad():
        assert z.argmax(-1).shape == y.shape
    return functional.cross_entropy(z, y)


def changed_through_a_view(z, y):
    first, second = z.view(-1, VOCABULARY), z.view(-1, VOCABULARY)
    first[:, 5:50] -= 3
    return functional.cross_entropy(second, y) + functional.cross_entropy(z.view(y.numel(), -1), y)


def problem(dtype=torch.float64, bias=True):
    """Hidden states, a frozen head, and labels of which some are ignored."""
    torch.manual_seed(0)
    head = nn.Linear(16, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(23, 16, dtype=dtype, requires_grad=True)
    target = torch.randint(0, VOCABULARY, (23,))
    target[::5] = -100
    return hidden, head, target


def tiny(kind, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, head_dim=8, pad_token_id=0, **sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunks_of_any_size_give_the_loss_and_its_gradient(bias, reduction, rows, monkeypatch):
    monkeypatch.setattr(logits, "CHUNK", rows * VOCABULARY)
    hidden, head, target = problem(bias=bias)
    loss = functional.cross_entropy(promise(hidden, head), target, reduction=reduction)
    exact = functional.cross_entropy(head(hidden), target, reduction=reduction)
    torch.testing.assert_close(loss, exact, rtol=1e-13, atol=0)
    (ours,) = torch.autograd.grad(3 * loss, hidden)
    (theirs,) = torch.autograd.grad(3 * exact, hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened_as_transformers_does(dtype):
    hidden, head, target = problem(dtype)
    loss = functional.cross_entropy(promise(hidden, head).float(), target)
    exact = functional.cross_entropy(head(hidden).float(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    (ours,), (theirs,) = (torch.autograd.grad(value, hidden) for value in (loss, exact))
    assert float((ours - theirs).float().norm() / theirs.float().norm()) < torch.finfo(dtype).eps


def test_far_apart_logits_neither_overflow_nor_vanish():
    hidden, head, target = problem(torch.float32)
    large = (hidden * 1e4).detach().requires_grad_()
    loss = functional.cross_entropy(promise(large, head), target)
    torch.testing.assert_close(loss, functional.cross_entropy(head(large), target))
    assert loss > 1e3


@pytest.mark.parametrize(
    "use",
    [
        lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: functional.cross_entropy(z, y, reduction="none").sum(),
        lambda z, y: functional.cross_entropy(z, y, weight=torch.linspace(1, 2, VOCABULARY)),
        lambda z, y: functional.cross_entropy(z / 3, y),
        lambda z, y: functional.cross_entropy(30 * torch.tanh(z / 30), y),
        lambda z, y: functional.cross_entropy(z[:-1], y[1:]),
        lambda z, y: functional.nll_loss(z.log_softmax(-1), y),
        lambda z, y: functional.cross_entropy(torch.cat([z, z]), torch.cat([y, y])),
        lambda z, y: functional.cross_entropy(z.view(-1, 1, VOCABULARY)[:, 0], y),
        lambda z, y: functional.cross_entropy(z.mul_(2), y) + z.sum(),
        lambda z, y: (z * z.requires_grad).sum(),
        after_a_metric,
        changed_through_a_view,
        lambda z, y: functional.cross_entropy(z.float().mul_(3), y) + z.sum(),
        FusedLoss.apply,
        lambda z, y: checkpoint(functional.cross_entropy, z, y, use_reentrant=True),
        lambda z, y: checkpoint(FusedLoss.apply, z, y, use_reentrant=False),
        lambda z, y: torch.vmap(lambda row: row.log_softmax(-1)[0])(z).sum(),
        lambda z, y: functional.cross_entropy(z.view(size=(-1, VOCABULARY)), y),
        lambda z, y: functional.cross_entropy(z.float(memory_format=torch.preserve_format), y),
    ],
)
def test_a_promise_is_kept_at_any_other_use(use):
    hidden, head, target = problem(torch.float32)
    ours, theirs = use(promise(hidden, head), target), use(head(hidden), target)
    assert not isinstance(ours, PromisedLogits)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    gradient, hidden.grad = hidden.grad, None
    theirs.backward()
    torch.testing.assert_close(gradient, hidden.grad)


@pytest.mark.parametrize(
    ("make", "promised"),
    [
        (tiny_llama, True),
        (tiny_gpt2, True),
        (tiny_t5, True),
        (lambda: tiny("Qwen2"), True),
        (lambda: tiny("Mistral"), True),
        (lambda: tiny("Gemma2", final_logit_softcapping=3.0), False),
        (lambda: tiny("Granite", logits_scaling=7.0), False),
        (lambda: tiny("Cohere", logit_scale=0.1), False),
    ],
    ids=["llama", "gpt2", "t5", "qwen2", "mistral", "gemma2", "granite", "cohere"],
)
def test_models_with_and_without_their_own_logits_get_their_own_loss(make, promised, monkeypatch):
    """Soft capping and scaling happen between head and loss; skipping them would be silent."""
    chunked = []
    apply = logits._ChunkedCrossEntropy.apply
    monkeypatch.setattr(
        logits._ChunkedCrossEntropy, "apply", lambda *args: chunked.append(1) or apply(*args)
    )
    model = make().eval()
    batch = batches_for("t5" if model.config.is_encoder_decoder else "llama")[0]
    with left_as_found(model, train=False):
        exact = model(**batch).loss
        with promised_logits(model):
            ours = model(**batch).loss
    torch.testing.assert_close(ours, exact)
    assert bool(chunked) == promised


def test_no_tensor_of_an_initialisation_has_a_number_for_every_token_and_word(monkeypatch):
    model, batches = adapted(tiny_llama(vocab_size=5000)), batches_for(rows=(6,), length=40)
    monkeypatch.setattr(logits, "CHUNK", 10 * 5000)
    everything = batches[0]["input_ids"].numel() * 5000
    with LargestTensor() as seen:
        lora_one.initialize(copy.deepcopy(model), batches, method="lora_one")
    assert seen.numel == 5000 * 32  # the head's own weight, as a view
    monkeypatch.setattr(logits, "_frozen_head", lambda model: None)
    with LargestTensor() as seen:
        lora_one.initialize(model, batches, method="lora_one")
    assert seen.numel == everything  # the mode sees them


def test_the_head_is_left_as_found_also_after_an_exception():
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ZeroDivisionError), promised_logits(model):
        assert "forward" in vars(model.lm_head)
        raise ZeroDivisionError
    assert "forward" not in vars(model.lm_head)


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)


def trainable(model):
    model.lm_head.requires_grad_(True)


def replaced(model):
    model.lm_head.forward = lambda hidden: 2 * nn.Linear.forward(model.lm_head, hidden)


def another_class(model):
    class Doubled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model.lm_head.__class__ = Doubled


@pytest.mark.parametrize("change", [hooked, trainable, replaced, another_class])
def test_a_head_that_does_more_than_multiply_is_left_alone(change):
    model, batch = tiny_llama().requires_grad_(False), batches_for()[0]
    change(model)
    exact = model(**batch).loss
    with promised_logits(model):
        out = model(**batch)
    assert not isinstance(out.logits, PromisedLogits)
    assert torch.equal(out.loss, exact)


def test_autocast_decides_the_head_s_dtype():
    model, batch = tiny_llama().requires_grad_(False), batches_for()[0]
    with torch.autocast("cpu", torch.bfloat16), promised_logits(model):
        assert model(**batch).logits.dtype == torch.bfloat16


def test_an_adapted_head_gets_its_gradient():
    model, batches = tiny_llama(), batches_for()
    with_head = lora_one.estimate_gradients(model, batches, target_modules=["lm_head", "q_proj"])
    without = lora_one.estimate_gradients(model, batches, target_modules=["q_proj"])
    assert with_head["lm_head"].abs().max() > 0
    for name, gradient in without.items():
        torch.testing.assert_close(with_head[name], gradient)
