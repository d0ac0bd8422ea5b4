"""Ranks by spectrum: the budget holds, nothing better fits into it, plain PEFT reads the result."""

import copy
import math
from itertools import product

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import lora_one
from lora_one.adapters.allocation import LARGEST
from lora_one.errors import InputError
from lora_one.layers import adapted_layers, base_weight, plain_layers
from lora_one.numerics.allocation import captured, share_budget

from .tiny import SIZES, TARGETS, Endings, batches_for, logits, perturb, tiny_gpt2, tiny_t5


def random_problem(seed, layers=4, largest=4):
    """Falling gains of very different sizes per layer, and costs with no common divisor."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (2 * torch.rand(layers, 1, generator=generator))
    gains = (sizes * torch.rand(layers, largest, generator=generator)).double()
    costs = torch.randint(5, 25, (layers,), generator=generator).tolist()
    return gains.sort(descending=True).values.tolist(), costs


def cost_of(ranks, costs):
    return sum(r * cost for r, cost in zip(ranks, costs, strict=True))


def optimum(gains, costs, rank):
    """Try every combination of ranks."""
    fitting = [
        captured(gains, ranks)
        for ranks in product(*(range(1, len(layer) + 1) for layer in gains))
        if cost_of(ranks, costs) <= rank * sum(costs)
    ]
    return max(fitting)


@pytest.mark.parametrize("seed", range(20))
def test_equal_costs_give_the_optimum(seed):
    gains, costs = random_problem(seed)[0], [7] * 4
    ranks = share_budget(gains, costs, 2)
    assert captured(gains, ranks) == optimum(gains, costs, 2)
    assert sum(ranks) == 8


@pytest.mark.parametrize("seed", range(40))
def test_unequal_costs_miss_less_than_one_gain(seed):
    gains, costs = random_problem(seed)
    ranks = share_budget(gains, costs, 2)
    left_out = [layer[r] for layer, r in zip(gains, ranks, strict=True) if r < len(layer)]
    assert optimum(gains, costs, 2) - captured(gains, ranks) < max(left_out)
    assert captured(gains, ranks) >= captured(gains, [2] * 4)
    # No further rank fits into what is left.
    left = 2 * sum(costs) - cost_of(ranks, costs)
    open_costs = [c for c, r, layer in zip(costs, ranks, gains, strict=True) if r < len(layer)]
    assert 0 <= left < min(open_costs)


def test_equal_ranks_are_kept_where_the_greedy_choice_gains_less():
    # The first layer's third rank is the better bargain, and leaves 2 parameters for nobody.
    gains, costs = [[9.0, 5.0, 2.0], [9.0, 4.5]], [2, 6]
    assert share_budget(gains, costs, 2) == [2, 2]
    gains = [[9.0, 5.0, 2.0], [9.0, 0.5]]
    assert share_budget(gains, costs, 2) == [3, 1]


@pytest.mark.parametrize("gains", [[8.0, 4.0, 2.0, 1.0], [3.0] * 4, [0.0] * 4])
def test_equal_layers_get_equal_ranks(gains):
    assert share_budget([gains] * 5, [9] * 5, 2) == [2] * 5


def test_ties_go_to_the_first_layer():
    assert share_budget([[5.0, 3.0, 2.0]] * 3, [4, 4, 4], 1) == [1, 1, 1]
    gains = [[9.0, 1.0, 1.0], [9.0, 5.0, 5.0], [9.0, 1.0, 1.0]]
    assert share_budget(gains, [4, 4, 4], 2) == [2, 3, 1]


def test_a_rank_that_a_layer_cannot_have_is_refused():
    with pytest.raises(ValueError, match="got 3"):
        share_budget([[1.0, 1.0]], [2], 3)


def allocated(base, batches, method="lora_one", r=4, rslora=True, targets=TARGETS["llama"], **more):
    """Return the allocation, and a started adapter that has it."""
    found = lora_one.allocate_ranks(base, batches, rank=r, target_modules=targets, method=method)
    config = LoraConfig(
        r=r,
        lora_alpha=8,
        use_rslora=rslora,
        target_modules=targets,
        rank_pattern=found.ranks,
        alpha_pattern=lora_one.alpha_pattern(found.ranks, r=r, lora_alpha=8, use_rslora=rslora),
        **more,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    lora_one.initialize(model, batches, method=method, stable_gamma=16)
    return found, model


def energies_of(matrices, ranks, q=1):
    squares = {n: torch.linalg.svdvals(M.double()).square() for n, M in matrices.items()}
    total = sum(float(s.sum()) for s in squares.values())
    return sum(float(squares[n][: q * ranks[n]].sum()) for n in squares) / total


@pytest.mark.parametrize("method", ["lora_one", "lora_ga", "lora", "pissa"])
def test_the_spectrum_is_that_of_what_the_method_starts_from(llama, llama_batches, method):
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    found = lora_one.allocate_ranks(
        llama, llama_batches, rank=4, target_modules=TARGETS["llama"], method=method
    )
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())
    layers = plain_layers(llama, TARGETS["llama"])
    matrices = {x.name: base_weight(x.module).float() for x in layers}
    if method != "pissa":
        matrices = lora_one.estimate_gradients(llama, llama_batches, target_modules=list(matrices))
    q = 2 if method == "lora_ga" else 1
    uniform = dict.fromkeys(found.ranks, 4)
    assert found.captured_energy == pytest.approx(energies_of(matrices, found.ranks, q), rel=1e-5)
    assert found.uniform_energy == pytest.approx(energies_of(matrices, uniform, q), rel=1e-5)
    assert found.captured_energy > found.uniform_energy
    assert found.parameters <= found.budget
    assert found.budget == 4 * sum(sum(M.shape) for M in matrices.values())
    assert list(found.ranks) == [x.name for x in layers]
    for name, rank in found.ranks.items():
        assert 1 <= rank <= min(LARGEST * 4, min(matrices[name].shape) // q)


def test_the_start_is_the_best_part_of_the_gradient_of_each_layers_own_rank(llama, llama_batches):
    """``s B A = -s/(gamma σ_0) G_r``, whatever r: the scaling s is that of the uniform rank."""
    found, model = allocated(llama, llama_batches)
    assert len(set(found.ranks.values())) > 1
    gradients = lora_one.estimate_gradients(llama, llama_batches, target_modules=list(found.ranks))
    s = 8 / math.sqrt(4)
    for layer in adapted_layers(model):
        r = found.ranks[layer.name]
        assert layer.r == r
        assert layer.s == pytest.approx(s, rel=1e-12)
        U, S, Vh = torch.linalg.svd(gradients[layer.name].double())
        expected = -(s / (16 * S[0])) * (U[:, :r] * S[:r]) @ Vh[:r]
        start = layer.s * (layer.B @ layer.A).double()
        assert torch.linalg.matrix_norm(start - expected) < 1e-4 * torch.linalg.matrix_norm(
            expected
        )


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("method", ["lora_one", "lora_ga", "pissa", "lora"])
def test_plain_peft_reads_the_exported_adapter(llama, llama_batches, tmp_path, method, rslora):
    found, model = allocated(llama, llama_batches, method, rslora=rslora)
    perturb(model)
    report = lora_one.export_adapter(model, tmp_path / "adapter")
    times = 2 if method in ("lora_ga", "pissa") else 1
    assert report.rank_range == tuple(
        times * r for r in (min(found.ranks.values()), max(found.ranks.values()))
    )
    reloaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "adapter")
    for batch in llama_batches:
        expected = logits(model, batch)
        assert (logits(reloaded, batch) - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-5
    config = reloaded.peft_config["default"]
    without_patterns = config.lora_alpha / (math.sqrt(config.r) if rslora else config.r)
    for layer in adapted_layers(reloaded):
        assert layer.s == pytest.approx(without_patterns, rel=1e-12)


def test_an_adapter_that_is_cut_to_one_rank_needs_no_patterns(llama, llama_batches, tmp_path):
    _, model = allocated(llama, llama_batches)
    perturb(model)
    largest = max(layer.r for layer in adapted_layers(model))
    lora_one.export_adapter(model, tmp_path / "adapter", rank=largest)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "adapter")
    config = reloaded.peft_config["default"]
    assert (config.r, config.rank_pattern, config.alpha_pattern) == (largest, {}, {})
    expected = logits(model, llama_batches[0])
    assert torch.allclose(logits(reloaded, llama_batches[0]), expected, atol=1e-5)


def test_a_merge_keeps_the_logits(llama, llama_batches):
    from lora_one.adapters.merge import merge_adapter

    _, model = allocated(llama, llama_batches)
    perturb(model)
    expected = logits(model, llama_batches[0])
    assert torch.allclose(logits(merge_adapter(model), llama_batches[0]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "make"), [("gpt2", tiny_gpt2), ("t5", tiny_t5)], ids=["gpt2", "t5"]
)
def test_other_architectures(kind, make):
    base, batches = make(), batches_for(kind)
    found, model = allocated(base, batches, targets=TARGETS[kind])
    assert {layer.name: layer.r for layer in adapted_layers(model)} == found.ranks


def test_ranks_are_those_of_layers_whose_names_end_alike_too():
    found = lora_one.allocate_ranks(
        Endings(), rank=4, target_modules=["proj", "other"], method="pissa"
    )
    assert list(found.ranks) == ["^proj", "sub.proj", "sub.other"]
    reordered = dict(reversed(found.ranks.items()))
    for ranks in (found.ranks, reordered):
        config = LoraConfig(r=4, target_modules=["proj", "other"], rank_pattern=ranks)
        model = get_peft_model(Endings(), config)
        assert [layer.r for layer in adapted_layers(model)] == list(found.ranks.values())


def classifiers():
    """Return two sequence classifiers, whose heads PEFT knows by different names."""
    sizes = {"num_labels": 2, "pad_token_id": 0}
    llama = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, **sizes))
    bert_sizes = {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(**bert_sizes, **sizes)
    )
    return {"llama": llama, "bert": bert}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_all_linear_layers_of_a_classifier_are_pefts(kind):
    model = classifiers()[kind]
    names = [layer.name for layer in plain_layers(model, "all-linear")]
    config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    assert names == [layer.name for layer in adapted_layers(get_peft_model(model, config))]


def test_a_layer_that_no_token_reaches_gets_what_nobody_else_can_use(llama, llama_batches):
    with torch.no_grad():
        llama.model.layers[0].self_attn.o_proj.weight.zero_()  # nothing flows back to q, k and v
    targets = ["q_proj", "o_proj"]
    found = lora_one.allocate_ranks(llama, llama_batches, rank=2, target_modules=targets)
    assert found.ranks["model.layers.0.self_attn.q_proj"] == 1
    assert sum(found.ranks.values()) == 8


def test_micro_batches_are_shared_out_as_their_rows_allow(llama, llama_batches):
    """All strategies see one gradient, so they find the same ranks."""
    ranks = [
        lora_one.allocate_ranks(llama, llama_batches, rank=4, strategy=strategy, memory_budget=1)
        for strategy in ("hold", "join", "groups")
    ]
    assert ranks[0].ranks == ranks[1].ranks == ranks[2].ranks


def test_what_cannot_be_allocated_is_refused(llama, llama_batches):
    with pytest.raises(InputError, match="pass the init batches"):
        lora_one.allocate_ranks(llama, rank=4)
    with pytest.raises(
        InputError, match=r"rank 17 is too large for layer .*k_proj.* at most rank 16"
    ):
        lora_one.allocate_ranks(llama, llama_batches, rank=17)
    with pytest.raises(InputError, match=r"lora_ga can have at most rank 8 there"):
        lora_one.allocate_ranks(llama, llama_batches, rank=9, method="lora_ga")
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        lora_one.allocate_ranks(llama, llama_batches, rank=0)
    with pytest.raises(InputError, match="Did you mean 'lora_one'"):
        lora_one.allocate_ranks(llama, llama_batches, rank=4, method="lora_on")
    _, adapted = allocated(llama, llama_batches)
    with pytest.raises(InputError, match="before there is an adapter"):
        lora_one.allocate_ranks(adapted, llama_batches, rank=4)
