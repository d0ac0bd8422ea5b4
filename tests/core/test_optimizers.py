"""The preconditioned optimizer is its base optimizer on preconditioned gradients, nothing else."""

import copy
import functools
import io

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from peft.tuners.lora.config import BdLoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

import lora_one
from lora_one.layers import adapted_layers
from lora_one.optimizers import lora_pairs
from lora_one.preconditioning import _precondition_stacked, precondition_pairs

from .tiny import SIZES, adapted, batches_for, perturb, tiny_llama


def started(**options):
    """A PeftModel whose factors both differ from zero."""
    peft_model = adapted(tiny_llama(), **options)
    perturb(peft_model, size=0.1)
    return peft_model


def train(model, optimizer, steps, batches=None):
    losses = []
    for step in range(steps):
        batches = batches or batches_for()
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def trainable(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_bitwise(a, b):
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_equals_adamw_with_preconditioning_off(options):
    ours, theirs = started(), started()
    settings = {"lr": 1e-2, "weight_decay": 0.1, **options}
    make = lora_one.create_preconditioned_optimizer
    optimizer = make(ours, torch.optim.AdamW, preconditioned=False, **settings)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    train(ours, optimizer, 4)
    train(theirs, torch.optim.AdamW(parameters, **settings), 4)
    assert_bitwise(trainable(ours), trainable(theirs))


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_equals_pefts_riemannian_at_equal_damping(optimizer_cls):
    ours, theirs = started(use_dora=True), started(use_dora=True)
    settings = {"lr": 1e-2, "reg": 1e-2}
    first = lora_one.create_preconditioned_optimizer(ours, optimizer_cls, **settings)
    second = create_riemannian_optimizer(theirs, optimizer_cls, **settings)
    train(ours, first, 3)
    train(theirs, second, 3)
    for name, value in trainable(theirs).items():
        # Their pseudo-inverse and our solve differ by fp32 rounding times the condition number.
        torch.testing.assert_close(trainable(ours)[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("r", [1, 3, 4, 12])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_each_gradient_equals_a_float64_solve_with_the_factors_before_the_step(
    r, stacked, autocast, monkeypatch
):
    model = started(r=r, targets=["q_proj", "lm_head"])  # lm_head has an odd number of rows
    model(**batches_for()[0]).loss.backward()
    expected = {}
    for name, (A, B) in lora_pairs(model).items():
        a, b, g_a, g_b = (t.detach().double() for t in (A, B, A.grad, B.grad))
        eye = torch.eye(len(a), dtype=torch.float64)
        expected[name] = (
            torch.linalg.solve(b.T @ b + 1e-3 * eye, g_a),
            torch.linalg.solve(a @ a.T + 1e-3 * eye, g_b, left=False),
        )
    pairs = list(lora_pairs(model).values())
    if stacked:  # what GPUs use
        monkeypatch.setattr(
            "lora_one.preconditioning._precondition_one_by_one", _precondition_stacked
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        precondition_pairs(pairs, 1e-3)
    for name, (A, B) in lora_pairs(model).items():
        for gradient, exact in ((A.grad, expected[name][0]), (B.grad, expected[name][1])):
            error = (gradient - exact).norm() / exact.norm()
            assert error < 1e-5, name


def test_a_gpu_is_asked_for_no_more_operations_by_more_pairs_of_the_same_shapes(monkeypatch):
    class Counted(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr("lora_one.preconditioning._precondition_one_by_one", _precondition_stacked)
    counts = []
    for layers in (1, 3):
        model = adapted(tiny_llama(num_hidden_layers=layers))
        model(**batches_for()[0]).loss.backward()
        pairs = list(lora_pairs(model).values())
        with Counted() as counted:
            precondition_pairs(pairs, 1e-3)
        counts.append(counted.count)
    assert counts[0] == counts[1]


def test_sgd_step_is_invariant_in_the_product():
    """(B R, R⁻¹ A) and (B, A) move the product alike to first order in the learning rate."""
    models = [started(), started()]
    products = []
    R = torch.eye(4) + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in adapted_layers(models[1]):
            layer.B.copy_(layer.B @ R)
            layer.A.copy_(torch.linalg.solve(R, layer.A))
    for model in models:
        before = [x.B.detach().double() @ x.A.detach().double() for x in adapted_layers(model)]
        optimizer = lora_one.create_preconditioned_optimizer(
            model, torch.optim.SGD, lr=1e-3, reg=0.0
        )
        model(**batches_for()[0]).loss.backward()
        optimizer.step()
        after = [x.B.detach().double() @ x.A.detach().double() for x in adapted_layers(model)]
        products.append([a - b for a, b in zip(after, before, strict=True)])
    for first, second in zip(*products, strict=True):
        # What remains is the second-order term lr² dB dA and fp32 rounding.
        assert float((first - second).norm() / first.norm()) < 0.02


@pytest.mark.parametrize("relative", [False, True])
def test_ten_steps_equal_five_resume_and_five(relative, tmp_path):
    make = lora_one.create_preconditioned_optimizer
    settings = {"lr": 1e-2, "reg": 1e-4, "relative": relative}
    whole = started()
    train(whole, make(whole, torch.optim.AdamW, **settings), 10)
    first = started()
    optimizer = make(first, torch.optim.AdamW, **settings)
    batches = batches_for()
    train(first, optimizer, 5, batches)
    torch.save({"m": first.state_dict(), "o": optimizer.state_dict()}, tmp_path / "checkpoint")
    second = started()
    stored = torch.load(tmp_path / "checkpoint")
    second.load_state_dict(stored["m"])
    optimizer = make(second, torch.optim.AdamW, **settings)
    optimizer.load_state_dict(stored["o"])
    train(second, optimizer, 5, batches[1:] + batches[:1])  # step 5 takes the second batch
    assert_bitwise(trainable(second), trainable(whole))


def test_trainer_resumes_bit_for_bit_with_accumulation_and_clipping(tmp_path):
    rows = batches_for(rows=(4,))[0]
    dataset = [{key: value[i] for key, value in rows.items()} for i in range(4)]
    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = started()
        optimizer = lora_one.create_preconditioned_optimizer(
            model, torch.optim.AdamW, lr=1e-2, fused=True
        )
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=4,
            save_steps=2,
            max_grad_norm=0.5,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=dataset, optimizers=(optimizer, None)
        )
        trainer.train(resume_from_checkpoint=resume)
        results.append(trainable(model))
    assert_bitwise(*results)


def test_state_is_the_base_optimizers(tmp_path):
    ours, theirs = started(), started()
    first = lora_one.create_preconditioned_optimizer(ours, torch.optim.AdamW, lr=1e-2)
    second = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    train(ours, first, 1)
    train(theirs, second, 1)
    a, b = first.state_dict(), second.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert {k: set(v) for k, v in a["state"].items()} == {k: set(v) for k, v in b["state"].items()}


def test_damping_can_be_read_and_changed():
    model = started()
    optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.SGD, lr=1.0, reg=1e-2)
    assert (optimizer.reg, optimizer.relative) == (1e-2, False)
    optimizer.reg = 1e12  # then the preconditioner divides by d and nothing moves
    before = copy.deepcopy(trainable(model))
    train(model, optimizer, 1)
    for name, value in trainable(model).items():
        torch.testing.assert_close(value, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_train(dtype):
    model = adapted(tiny_llama())
    lora_one.initialize(model, batches_for(), method="lora_one", dtype=dtype)
    # AdamW's default eps of 1e-8 is zero in fp16.
    optimizer = lora_one.create_preconditioned_optimizer(
        model, torch.optim.AdamW, lr=1e-3, reg=1e-6, eps=1e-4
    )
    losses = train(model, optimizer, 6, batches_for(rows=(3,)))
    assert {A.dtype for A, _ in optimizer.lora_pairs} == {dtype}
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(value).all() for value in trainable(model).values())


def test_lora_start_with_b_zero_trains():
    model = adapted(tiny_llama())
    optimizer = lora_one.create_preconditioned_optimizer(
        model, torch.optim.AdamW, lr=1e-2, reg=1e-6
    )
    losses = train(model, optimizer, 8, batches_for(rows=(3,)))
    assert losses[-1] < losses[0]


def test_gradient_accumulation_and_missing_gradients():
    model = started()
    optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.SGD, lr=1e-2, reg=1e-2)
    for batch in batches_for():
        model(**batch).loss.backward()
    pairs = list(lora_pairs(model).values())
    untouched, half = pairs[0], pairs[1]
    untouched[0].grad = untouched[1].grad = half[1].grad = None
    old = half[0].grad.clone()
    optimizer.step()
    assert untouched[0].grad is None
    assert half[1].grad is None
    assert not torch.equal(half[0].grad, old)


def test_other_parameters_are_left_to_the_base_optimizer_and_named():
    model = started(targets=["embed_tokens", "q_proj"], use_dora=True, modules_to_save=["lm_head"])
    optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=1e-3)
    kinds = {"lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B", "modules_to_save"}
    assert all(any(kind in name for kind in kinds) for name in optimizer.unpreconditioned)
    assert {k for k in kinds for name in optimizer.unpreconditioned if k in name} == kinds
    assert len(optimizer.lora_pairs) == 2
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(optimizer.unpreconditioned) + 4


def experts():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    base = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    projections = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    return get_peft_model(
        base, LoraConfig(r=2, target_modules=["v_proj"], target_parameters=projections)
    )


def block_diagonal():
    blocks = BdLoraConfig(
        nblocks=2,
        target_modules_bd_a=["o_proj"],
        target_modules_bd_b=["q_proj"],
        match_strict=False,
    )
    return adapted(tiny_llama(), targets=["q_proj", "o_proj", "v_proj"], use_bdlora=blocks)


def mismatched():
    """What a variant of LoRA with another product may hold: B has not A's rank."""
    model = adapted(tiny_llama())
    for name, module in model.named_modules():
        if name.endswith(("q_proj.lora_B.default", "down_proj.lora_B.default")):
            module.weight = torch.nn.Parameter(torch.ones(5, 3))
    return model


@pytest.mark.parametrize("make_model", [experts, block_diagonal, mismatched])
def test_only_factors_whose_product_is_b_a_are_pairs(make_model):
    model = make_model()
    optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=1e-3)
    assert all("v_proj" in name for name in lora_pairs(model))
    assert len(optimizer.lora_pairs) == 2
    others = {name for name in trainable(model) if "v_proj" not in name}
    assert set(optimizer.unpreconditioned) == others


def sharded(parameters):
    """As FSDP2 and accelerate leave them: other tensors in the places of the parameters."""
    return [torch.nn.Parameter(p.detach().clone()) for p in parameters]


def flattened(parameters):
    """As DeepSpeed ZeRO-1 and 2 leave them."""
    return [torch.nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))]


@pytest.mark.parametrize("replace", [sharded, flattened, lambda parameters: parameters[1:]])
def test_a_step_without_the_factors_of_the_pairs_is_refused(replace):
    optimizer = lora_one.create_preconditioned_optimizer(started(), torch.optim.AdamW, lr=1e-3)
    group = optimizer.param_groups[0]
    group["params"] = replace(group["params"])
    with pytest.raises(lora_one.InputError, match="no longer holds the LoRA factors"):
        optimizer.step()
    optimizer.preconditioned = False
    optimizer.step()


def test_the_pairs_may_be_spread_over_groups():
    model = started()
    optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.SGD, lr=1e-2)
    whole = optimizer.param_groups.pop()["params"]
    for parameters in (whole[::2], whole[1::2]):
        optimizer.add_param_group({"params": parameters})
    train(model, optimizer, 1)
    other = started()
    train(other, lora_one.create_preconditioned_optimizer(other, torch.optim.SGD, lr=1e-2), 1)
    assert_bitwise(trainable(model), trainable(other))


def test_hooks_of_a_step_run_once_whatever_was_made_before():
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # torch wraps the class's step now
    model = started()
    optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps the instance's step
    runs = []
    optimizer.register_step_pre_hook(lambda *_: runs.append("before"))
    optimizer.register_step_post_hook(lambda *_: runs.append("after"))
    train(model, optimizer, 1)
    assert runs == ["before", "after"]


def test_a_users_own_step_is_called():
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # ``wraps`` copies torch's mark
    calls = []

    class Counted(torch.optim.AdamW):
        @functools.wraps(torch.optim.AdamW.step)
        def step(self, closure=None):
            calls.append(1)
            return super().step(closure)

    model = started()
    train(model, lora_one.create_preconditioned_optimizer(model, Counted, lr=1e-3), 1)
    assert calls == [1]


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_model_and_optimizer_trains_like_them(copied):
    model = started()
    make = lora_one.create_preconditioned_optimizer
    optimizer = make(model, torch.optim.AdamW, lr=1e-2, reg=1e-3, relative=True)
    train(model, optimizer, 2)
    twin, twins_optimizer = copied((model, optimizer))
    before = copy.deepcopy(trainable(model))
    train(twin, twins_optimizer, 2)
    assert_bitwise(trainable(model), before)
    train(model, optimizer, 2)
    assert_bitwise(trainable(twin), trainable(model))


def test_without_damping_a_zero_factor_is_named():
    model = adapted(tiny_llama())
    optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.SGD, lr=1e-3, reg=0.0)
    with pytest.raises(lora_one.errors.NonFiniteError, match="the factor is zero"):
        train(model, optimizer, 1)


def test_schedulers_see_the_base_optimizer():
    optimizer = lora_one.create_preconditioned_optimizer(started(), torch.optim.AdamW, lr=1.0)
    assert isinstance(optimizer, torch.optim.AdamW)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_errors_are_those_of_peft():
    make = lora_one.create_preconditioned_optimizer
    model = started()
    with pytest.raises(TypeError, match=r"subclass of torch\.optim\.Optimizer"):
        make(model, torch.nn.Linear, lr=1e-3)
    with pytest.raises(ValueError, match="requires a closure"):
        make(model, torch.optim.LBFGS, lr=1e-3)
    with pytest.raises(ValueError, match=r"no trainable lora_A/lora_B pairs.*is_trainable=True"):
        make(tiny_llama(), torch.optim.AdamW, lr=1e-3)
    for reg in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must not be negative, infinite or NaN"):
            make(model, torch.optim.AdamW, lr=1e-3, reg=reg)
    with pytest.raises(ValueError, match="does not support closures"):
        make(model, torch.optim.AdamW, lr=1e-3).step(lambda: None)
    adalora = get_peft_model(
        tiny_llama(), AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj"])
    )
    with pytest.raises(ValueError, match="linear layers only"):
        make(adalora, torch.optim.AdamW, lr=1e-3)


def test_sharded_factors_are_refused():
    model = started()
    name, (A, _) = next(iter(lora_pairs(model).items()))
    A.ds_id = 0  # what DeepSpeed ZeRO-3 marks its parameters with
    with pytest.raises(lora_one.InputError, match="sharded or flattened"):
        lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=1e-3)
    assert ".lora_A." in name
