"""The streamed gradient is autograd's weight gradient, and the model is left as it was found."""

import random
import warnings
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import lora_one
from lora_one.gradients.plan import plan
from lora_one.gradients.stream import mean_loss, stream_gradients
from lora_one.gradients.tokens import checked_batches, supervised_tokens
from lora_one.layers import plain_layers

from .tiny import MODELS, TARGETS, adapted, batches_for, tiny_gpt2, tiny_llama, tiny_t5


def autograd_gradients(model, batches, names, train=False):
    """Token-weighted mean gradients by plain ``loss.backward()`` on the weights."""
    model.train(train)
    counts = [supervised_tokens(model, batch) for batch in batches]
    for batch, count in zip(batches, counts, strict=True):
        (model(**batch).loss * count).backward()
    gradients = {}
    for name in names:
        module = model.get_submodule(name)
        gradient = module.weight.grad / sum(counts)
        gradients[name] = gradient.T if type(module).__name__ == "Conv1D" else gradient
    model.zero_grad()
    return gradients


def assert_equal(ours, exact, tolerance):
    assert list(ours) == list(exact)
    for name, gradient in exact.items():
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_equals_autograd_in_float64(kind, wrapped, monkeypatch):
    model, batches = MODELS[kind]().double(), batches_for(kind)
    targets = {"targets": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
    if wrapped:  # an adapter that is switched on would change the gradient
        source = adapted(model, **targets)
        lora_one.initialize(source, method="lora")
        for name, parameter in source.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        ours = lora_one.estimate_gradients(source, batches)
    else:
        ours = lora_one.estimate_gradients(model, batches, target_modules=TARGETS[kind])
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # transformers' loss rounds
    exact = autograd_gradients(model, batches, ours, train=True)
    # 1e-12: only the order of float64 sums differs.
    assert_equal(ours, exact, 1e-12)


def test_micro_batches_of_any_size_give_the_mean_over_all_tokens():
    model, batches = tiny_llama(), batches_for(rows=(4, 1, 3))
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    split = lora_one.estimate_gradients(model, batches)
    whole = lora_one.estimate_gradients(model, [joined])
    assert_equal(split, whole, 1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("strategy", "budget"),
    [("hold", None), ("join", None), ("groups", 1), ("groups", 3 * 4 * 32 * 48), ("auto", 1)],
)
def test_strategies_change_memory_but_not_gradients(kind, strategy, budget):
    # Micro-batches of different lengths, so that joining has to pad.
    batches = batches_for(kind, rows=(2,)) + batches_for(kind, rows=(3,), length=9, seed=2)
    whole = lora_one.estimate_gradients(MODELS[kind](), batches)
    model = MODELS[kind]()
    ours = lora_one.estimate_gradients(model, batches, strategy=strategy, memory_budget=budget)
    assert_equal(ours, whole, 1e-5)
    assert not model.is_gradient_checkpointing


def test_plan_takes_the_first_way_that_applies(llama, llama_batches):
    layers = plain_layers(llama, "all-linear")
    counted = checked_batches(llama, llama_batches)
    assert plan(llama, counted[:1], layers, budget=1).strategy == "stream"
    assert plan(llama, counted, layers).strategy == "hold"
    assert plan(llama, counted, layers, budget=1).strategy == "join"
    assert plan(llama, counted, layers, budget=1, train=False).strategy == "groups"
    assert len(plan(llama, counted, layers, budget=1, train=False).groups) == len(layers)
    odd = [({**counted[0][0], "extra": 1}, 1), counted[1]]
    assert plan(llama, odd, layers, budget=1).strategy == "groups"
    with pytest.raises(lora_one.InputError, match="cannot be joined"):
        plan(llama, odd, layers, strategy="join")
    with pytest.raises(lora_one.InputError, match="Did you mean 'groups'"):
        plan(llama, counted, layers, strategy="group")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, llama_batches):
    plain, model = tiny_llama(), tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = lora_one.estimate_gradients(model, llama_batches)
    assert_equal(ours, lora_one.estimate_gradients(plain, llama_batches), 1e-6)


def test_tied_head_gets_the_gradient_of_its_own_use(llama_batches):
    tied, untied = tiny_llama(tie_word_embeddings=True).double(), tiny_llama().double()
    untied.load_state_dict(tied.state_dict())
    ours = lora_one.estimate_gradients(tied, llama_batches, target_modules=["lm_head"])
    assert_equal(ours, autograd_gradients(untied, llama_batches, ["lm_head"]), 1e-12)


class Shared(nn.Module):
    """The same linear layer twice, then in place, then a head: a causal model by its loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.twice = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        logits = self.head(input=x)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss}


def test_a_layer_that_runs_twice_gets_the_sum_and_an_unused_one_zero():
    torch.manual_seed(0)
    model = Shared().double()
    ids = torch.randint(0, 7, (3, 5))
    batches = [{"input_ids": ids, "labels": ids}] * 2
    ours = lora_one.estimate_gradients(model, batches, target_modules=["twice", "unused", "head"])
    assert ours.pop("unused").abs().max() == 0
    for batch in batches:
        model(**batch)["loss"].backward()
    for name in ("twice", "head"):
        torch.testing.assert_close(ours[name], model.get_submodule(name).weight.grad / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_summed_in_fp32(dtype, llama_batches):
    model = tiny_llama().to(dtype)
    ours = lora_one.estimate_gradients(model, llama_batches)
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    exact = lora_one.estimate_gradients(tiny_llama().to(dtype).double(), llama_batches)
    # Activations are rounded to 8 (bf16) or 11 (fp16) bits; sums are not rounded again.
    assert_equal(ours, exact, 0.05 if dtype == torch.bfloat16 else 0.01)


def test_dropout_follows_the_mode_and_the_seed(llama_batches):
    model = tiny_gpt2(resid_pdrop=0.3)
    off = lora_one.estimate_gradients(model, llama_batches, train=False)
    assert_equal(off, autograd_gradients(model, llama_batches, off), 1e-5)
    on, again, other = (
        lora_one.estimate_gradients(model, llama_batches, train=True, seed=seed)
        for seed in (0, 0, 1)
    )
    name = next(iter(on))
    assert torch.equal(on[name], again[name])
    assert not torch.allclose(on[name], other[name])
    assert not torch.allclose(on[name], off[name])


def test_kept_on_the_device_that_was_asked_for(llama, llama_batches):
    gradients = lora_one.estimate_gradients(llama, llama_batches, device="cpu")
    assert {gradient.device.type for gradient in gradients.values()} == {"cpu"}


def test_one_gradient_at_a_time_with_one_micro_batch(llama):
    """Layers arrive from last to first, each before the next one exists."""
    seen = []
    layers = plain_layers(llama, "all-linear")
    stream_gradients(llama, batches_for(rows=(4,)), layers, lambda name, g: seen.append(name))
    assert sorted(seen) == sorted(layer.name for layer in layers)
    depth = [int(name.split(".")[2]) for name in seen]
    assert depth == sorted(depth, reverse=True)


@pytest.mark.parametrize("strategy", ["auto", "join"])
def test_no_two_gradients_are_alive_together(strategy, llama):
    alive, most = [], 0

    def consume(name, gradient):
        nonlocal most
        alive[:] = [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(gradient))
        most = max(most, len(alive))

    rows = (4,) if strategy == "auto" else (1, 2, 1)
    layers = plain_layers(llama, "all-linear")
    stream_gradients(llama, batches_for(rows=rows), layers, consume, strategy=strategy)
    assert most == 1


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "required": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "cache": model.config.use_cache,
        "random": torch.get_rng_state().tolist(),
        "random of others": (random.getstate(), repr(np.random.get_state(legacy=False))),
        "weights": [parameter.detach().clone() for parameter in model.parameters()],
        "disabled": [getattr(module, "disable_adapters", None) for module in model.modules()],
    }


def assert_same(before, after):
    for key in before:
        if key in ("grads", "weights"):
            pairs = zip(before[key], after[key], strict=True)
            assert all((a is b) or torch.equal(a, b) for a, b in pairs), key
        else:
            assert before[key] == after[key], key


@pytest.mark.parametrize("strategy", ["hold", "join", "groups"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_model_is_left_as_found(fails, wrapped, strategy, llama, llama_batches):
    model = adapted(llama, lora_dropout=0.1) if wrapped else llama
    model.train()
    model.get_submodule("base_model.model.model.norm" if wrapped else "model.norm").eval()
    next(model.parameters()).requires_grad_(True)
    model(**llama_batches[0]).loss.backward()
    before = snapshot(model)
    if fails:
        broken = {**llama_batches[1], "input_ids": torch.full_like(ids_of(llama_batches), 10_000)}
        with pytest.raises(IndexError):
            lora_one.estimate_gradients(model, [llama_batches[0], broken], strategy=strategy)
    else:
        lora_one.estimate_gradients(model, llama_batches, seed=3, strategy=strategy)
    assert_same(before, snapshot(model))


class Convolved(nn.Module):
    """Linear layers around what has running means and draws from NumPy and ``random``."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 3)

    def forward(self, x, labels):
        masked = x * torch.as_tensor(np.random.rand(*x.shape) < 0.5 + random.random() / 4)
        hidden = torch.relu(self.norm(self.first(masked)))
        return (nn.functional.cross_entropy(self.last(hidden), labels),)


def images(rows=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, generator=generator)
    return {"x": x, "labels": torch.arange(rows) % 3}


def test_running_means_and_every_generator_are_as_before_and_seeds_repeat():
    model, batches = Convolved(), [images()]
    np.random.seed(0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    generators = repr(np.random.get_state(legacy=False)), random.getstate()
    first, second = (lora_one.estimate_gradients(model, batches, seed=5) for _ in range(2))
    assert (repr(np.random.get_state(legacy=False)), random.getstate()) == generators
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert_equal(first, second, 1e-12)
    np.random.seed(1)
    other = lora_one.estimate_gradients(model, batches)
    assert not torch.equal(other["first"], first["first"])


def test_a_layer_whose_output_the_model_changes_in_place_has_its_own_gradient():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))
    model.forward = lambda x, labels: (
        nn.functional.cross_entropy(nn.Sequential.forward(model, x), labels),
    )
    batch = images()
    ours = lora_one.estimate_gradients(model, [batch])
    model(**batch)[0].backward()
    assert_equal(ours, {name: model.get_submodule(name).weight.grad for name in ("0", "2")}, 1e-6)


def test_a_graph_that_is_alive_and_what_a_model_keeps_of_long_rows_survive():
    """Dynamic RoPE registers its frequencies anew for long rows, and remembers their length."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_llama(max_position_embeddings=16, rope_parameters=rope)
    long, short = batches_for(rows=(2,), length=40)[0], batches_for(rows=(2,), length=20)[0]
    loss = model(**short).loss
    again = [mean_loss(model, [long]) for _ in range(2)]
    lora_one.estimate_gradients(model, [long])
    assert mean_loss(model, [long]) == again[0] == again[1]
    loss.backward()


@pytest.mark.parametrize(
    "wrap",
    [lambda loss: [loss], lambda loss: loss, namedtuple("Output", "loss"), lambda x: {"loss": x}],
)
def test_a_loss_is_found_in_whatever_a_model_returns(wrap):
    model, batch = nn.Sequential(nn.Linear(8, 3)), images()
    model.forward = lambda x, labels: wrap(
        nn.functional.cross_entropy(nn.Sequential.forward(model, x), labels)
    )
    assert float(lora_one.estimate_gradients(model, [batch])["0"].norm()) > 0


def test_a_users_hook_on_the_output_counts_as_the_model(llama, llama_batches):
    model = tiny_llama()
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)
    ours = lora_one.estimate_gradients(model, llama_batches, target_modules=["q_proj"])
    assert_equal(ours, autograd_gradients(model, llama_batches, ours), 1e-5)


def test_autocast_is_the_models_and_gradients_are_summed_in_fp32(llama, llama_batches):
    with torch.autocast("cpu", torch.bfloat16):
        ours = lora_one.estimate_gradients(llama, llama_batches)
        exact = autograd_gradients(llama, llama_batches, ours)
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    assert_equal(ours, exact, 1e-2)  # autograd's own are rounded to bf16 on the way


def test_a_model_without_token_embeddings_has_gradients():
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_kernel=(4, 4),
        conv_stride=(4, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        num_labels=3,
        mask_time_prob=0.0,
        layerdrop=0.0,
    )
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    batch = {"input_values": torch.randn(4, 320), "labels": torch.tensor([0, 1, 2, 0])}
    ours = lora_one.estimate_gradients(
        model, [batch], target_modules=["q_proj", "v_proj"], train=False
    )
    assert_equal(ours, autograd_gradients(model, [batch], ours), 1e-5)


def test_the_count_that_trainer_passes_does_not_change_the_mean(llama, llama_batches):
    total = sum(supervised_tokens(llama, batch) for batch in llama_batches)
    counted = [{**batch, "num_items_in_batch": total} for batch in llama_batches]
    ours = lora_one.estimate_gradients(llama, counted)
    assert_equal(ours, lora_one.estimate_gradients(llama, llama_batches), 1e-6)
    assert mean_loss(llama, counted) == pytest.approx(mean_loss(llama, llama_batches))


def ids_of(batches):
    return batches[1]["input_ids"]


def test_mean_loss_is_the_loss_of_all_rows_in_one_batch(llama):
    batches = batches_for(rows=(4, 1, 3))
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    expected = float(llama(**joined).loss.detach())
    assert mean_loss(llama, batches) == pytest.approx(expected, rel=1e-6)


def test_supervised_tokens_follow_the_model_kind():
    labels = torch.tensor([[1, 2, -100], [-100, -100, 4]])
    assert supervised_tokens(tiny_llama(), {"labels": labels}) == 2
    assert supervised_tokens(tiny_t5(), {"labels": labels}) == 3


def test_micro_batches_without_supervision_are_skipped(llama, llama_batches):
    empty = {**llama_batches[0], "labels": torch.full_like(llama_batches[0]["labels"], -100)}
    ours = lora_one.estimate_gradients(llama, [empty, *llama_batches, empty])
    assert_equal(ours, lora_one.estimate_gradients(llama, llama_batches), 1e-6)


def test_bad_batches_are_refused(llama, llama_batches):
    labels = torch.full_like(llama_batches[0]["labels"], -100)
    no_labels = {key: value for key, value in llama_batches[0].items() if key != "labels"}
    for batches, message in (
        ([], "no batches"),
        ([no_labels], "batch 0 has no labels"),
        ([{**llama_batches[0], "labels": labels}], "none of the 1 batches supervises"),
        ([torch.zeros(2)], "batch 0 is a Tensor"),
        ([{**llama_batches[0], "labels": [[1, 2]]}], "labels of batch 0 are a list"),
    ):
        with pytest.raises(lora_one.InputError, match=message):
            lora_one.estimate_gradients(llama, batches)
    with pytest.raises(lora_one.InputError, match="LlamaModel returned no loss"):
        lora_one.estimate_gradients(Headless(llama.config), llama_batches)


class Headless(transformers.LlamaModel):
    """Takes labels and makes nothing of them."""

    def forward(self, labels=None, **inputs):
        return super().forward(**inputs)


Headless.__name__ = "LlamaModel"


class Router(nn.Linear):
    """A linear layer by its class only."""

    def forward(self, x):
        return super().forward(x).topk(1)


def test_a_layer_that_returns_something_else_than_w_x_is_named():
    model = nn.Sequential(nn.Linear(8, 8), Router(8, 3))
    model.forward = lambda x, labels: (nn.Sequential.forward(model, x)[0].sum(),)
    with pytest.raises(lora_one.InputError, match=r"layer '1' returns a topk .*\(a Router\)"):
        lora_one.estimate_gradients(model, [images()])


def test_gradients_are_taken_under_no_grad_and_refused_in_inference_mode(llama, llama_batches):
    expected = lora_one.estimate_gradients(llama, llama_batches)
    with torch.no_grad():
        assert_equal(lora_one.estimate_gradients(llama, llama_batches), expected, 1e-7)
    with torch.inference_mode(), pytest.raises(lora_one.InputError, match="inference_mode"):
        lora_one.estimate_gradients(llama, llama_batches)


def test_unknown_targets_are_refused_with_candidates(llama, llama_batches):
    with pytest.raises(lora_one.InputError, match=r"Did you mean 'q_proj'.*layers\.0\.self_attn"):
        lora_one.estimate_gradients(llama, llama_batches, target_modules=["q_prj"])


def test_non_finite_loss_and_gradient_are_named(llama, llama_batches):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(lora_one.NonFiniteError, match="batch 0 is nan"):
        lora_one.estimate_gradients(model, llama_batches)
    gradients = lora_one.estimate_gradients(llama, llama_batches)
    peft_model = adapted(llama)
    gradients = {
        k: v for k, v in gradients.items() if k.endswith(("q_proj", "v_proj", "down_proj"))
    }
    name = "model.layers.1.self_attn.q_proj"
    gradients[name][0, 0] = float("inf")
    with pytest.raises(lora_one.NonFiniteError, match=name):
        lora_one.initialize_adapters(peft_model, gradients, method="lora_one")
