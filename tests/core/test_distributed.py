"""Two gloo ranks see what one process sees. One pair of processes runs everything once."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model

import lora_one
from lora_one.gradients.stream import Ranks
from lora_one.layers import adapted_layers, base_weight, plain_layers
from lora_one.numerics.svd import truncated_svd

from .tiny import TARGETS, adapted, batches_for, known_spectrum, perturb, tiny_llama

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

ROWS = (2, 3, 1)
# One of each kind: decomposes W, decomposes G and rewrites W, random and rewrites W, leaves W.
SHARDED_METHODS = ("pissa", "lora_ga", "gaussian", "corda", "lora_one")
INPUT_METHODS = ("eva", "corda")


def factors_of(peft_model):
    return {
        x.name: (x.B.detach().clone(), x.A.detach().clone()) for x in adapted_layers(peft_model)
    }


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    try:
        torch.save(rank_results(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def rank_results(rank):
    results = {}
    batches = batches_for(rows=ROWS)
    even, uneven = batches[rank : rank + 1], batches[:2] if rank == 0 else batches[2:]
    results["even"] = lora_one.estimate_gradients(tiny_llama(), even)
    results["uneven"] = lora_one.estimate_gradients(tiny_llama(), uneven)
    results["groups"] = lora_one.estimate_gradients(
        tiny_llama(), uneven, strategy="groups", memory_budget=1
    )
    # Without a mask, and of two lengths on rank 0 alone.
    ragged = ragged_batches()
    ragged = ragged[:2] if rank == 0 else ragged[2:]
    results["ragged"] = lora_one.estimate_gradients(
        tiny_llama(), ragged, strategy="auto", memory_budget=1
    )
    results["ragged, joined"] = refused(ragged, strategy="join", memory_budget=1)

    peft_model = adapted(tiny_llama())
    report = lora_one.initialize(peft_model, uneven, method="lora_ga")
    results["losses"] = (report.loss_before, report.loss_after, report.tokens)
    results["factors"] = factors_of(peft_model)

    results["inputs"] = {method: started_from_inputs(uneven, method) for method in INPUT_METHODS}
    results["cores"] = started_with_cores(1 + rank, even)
    results["wide"] = started_wide(even)
    results["wide, uneven"] = started_wide(uneven)
    results["summands"] = decomposed_summands(rank)
    results["refused"] = refused(batches if rank == 0 else [])
    results["trained"] = trained_with_ddp(batches[rank])
    results["allocated"] = allocated(tiny_llama(), uneven, "lora_one")
    results["allocated, wide"] = allocated(wide_llama(), even, "lora_ga")
    results["allocated, sharded"] = allocated(sharded_llama(), even, "pissa")
    results["fsdp"] = lora_one.estimate_gradients(
        sharded_llama(), even, target_modules=TARGETS["llama"]
    )
    results["sharded"] = {
        method: started(sharded_llama(), even, method) for method in SHARDED_METHODS
    }
    results["sharded, uneven"] = refused(uneven, sharded_llama())
    results["sharded, tied"] = refused_tied(even)
    return results


def ragged_batches():
    batches = [{k: b[k] for k in ("input_ids", "labels")} for b in batches_for(rows=ROWS)]
    batches[1] = {key: values[:, :-2] for key, values in batches[1].items()}
    return batches


def started_from_inputs(batches, method):
    peft_model = adapted(tiny_llama())
    lora_one.initialize(peft_model, batches, method=method, measure_loss=False)
    return factors_of(peft_model)


def started_with_cores(count, batches):
    torch.set_num_threads(count)
    peft_model = adapted(tiny_llama())
    lora_one.initialize(peft_model, batches, method="lora_one")
    torch.set_num_threads(1)
    return factors_of(peft_model)


def wide_llama():
    """q_proj and down_proj (768 x 768) are wide enough for products, v_proj (192 x 768) is not."""
    sizes = {"hidden_size": 768, "intermediate_size": 768, "num_key_value_heads": 1}
    return tiny_llama(**sizes, num_hidden_layers=1)


def started_wide(batches):
    """Return factors, report, and the sizes of what was added up over the ranks."""
    sizes, add_up = [], dist.all_reduce

    def counted(tensor, *arguments):
        sizes.append(tensor.numel())
        return add_up(tensor, *arguments)

    peft_model = adapted(wide_llama())
    dist.all_reduce = counted
    try:
        report = lora_one.initialize(peft_model, batches, method="lora_one", measure_loss=False)
    finally:
        dist.all_reduce = add_up
    energies = [layer.captured_energy for layer in report.layers]
    return factors_of(peft_model), energies, sizes


def allocated(model, batches, method):
    """The ranks, and the share of the energy."""
    found = lora_one.allocate_ranks(
        model, batches, rank=4, target_modules=TARGETS["llama"], method=method
    )
    return found.ranks, found.captured_energy


def slow_spectrum():
    return known_spectrum(600, 500, [0.93**i for i in range(400)], dtype=torch.float32)[0]


def decomposed_summands(rank):
    """The two ranks hold parts that look nothing like the whole."""
    noise = torch.randn(600, 500, generator=torch.Generator().manual_seed(5))
    summand = noise if rank == 0 else slow_spectrum() - noise
    return tuple(truncated_svd(summand, 8, summands=Ranks()))


def refused(batches, model=None, **options):
    try:
        lora_one.estimate_gradients(model or tiny_llama(), batches, **options)
    except lora_one.InputError as error:
        return str(error)
    return None


def trained_with_ddp(batch):
    peft_model = adapted(tiny_llama())
    perturb(peft_model, size=0.1)
    optimizer = lora_one.create_preconditioned_optimizer(
        peft_model, torch.optim.AdamW, lr=1e-2, reg=1e-3
    )
    model = torch.nn.parallel.DistributedDataParallel(peft_model, gradient_as_bucket_view=True)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return factors_of(peft_model)


def refused_tied(batches):
    model = sharded_llama(tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["lm_head"])
    try:
        lora_one.initialize(get_peft_model(model, config), batches, method="pissa")
    except lora_one.InputError as error:
        return str(error)
    return None


def started(model, batches, method):
    """The factors and the base weights, whole, of an adapter's start."""
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"])
    peft_model = get_peft_model(model, config)
    report = lora_one.initialize(peft_model, batches, method=method)
    return {
        x.name: (x.B.detach() @ x.A.detach(), base_weight(x.module)[:])
        for x in adapted_layers(peft_model)
    }, report.loss_after


def sharded_llama(**options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama(**options)
    model.requires_grad_(False)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_close(ours, expected, tolerance=1e-5):
    assert list(ours) == list(expected)
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).norm() / gradient.norm()) < tolerance, name


@pytest.mark.parametrize(("case", "count"), [("even", 2), ("uneven", 3), ("groups", 3)])
def test_two_ranks_give_the_gradient_of_one_process(case, count, ranks):
    expected = lora_one.estimate_gradients(tiny_llama(), batches_for(rows=ROWS)[:count])
    for results in ranks:
        assert_close(results[case], expected)
    for name in expected:
        assert torch.equal(ranks[0][case][name], ranks[1][case][name])


def test_batches_that_one_rank_cannot_join_are_joined_on_none(ranks):
    expected = lora_one.estimate_gradients(tiny_llama(), ragged_batches())
    for results in ranks:
        assert_close(results["ragged"], expected)
        assert "cannot be joined" in results["ragged, joined"]


@pytest.mark.parametrize("case", ["factors", "cores"])
def test_factors_are_the_same_bit_for_bit_on_every_rank(case, ranks):
    """Also where the ranks have different numbers of cores."""
    for name, (B, A) in ranks[0][case].items():
        assert torch.equal(B, ranks[1][case][name][0])
        assert torch.equal(A, ranks[1][case][name][1])


def test_two_ranks_start_like_one_process(ranks):
    peft_model = adapted(tiny_llama())
    report = lora_one.initialize(peft_model, batches_for(rows=ROWS), method="lora_ga")
    losses = (report.loss_before, report.loss_after, report.tokens)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert ranks[0]["losses"] == pytest.approx(losses, rel=1e-5)
    for name, (B, A) in factors_of(peft_model).items():
        ours_B, ours_A = ranks[0]["factors"][name]
        # Signs of singular vectors come in pairs across B and A of neighbouring triplets, and
        # LoRA-GA mixes triplets, so projectors are compared.
        torch.testing.assert_close(ours_B @ ours_B.T, B @ B.T, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours_A.T @ ours_A, A.T @ A, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", INPUT_METHODS)
def test_two_ranks_start_from_the_inputs_of_all_their_rows(method, ranks):
    expected = started_from_inputs(batches_for(rows=ROWS), method)
    for name, (B, A) in expected.items():
        ours_B, ours_A = ranks[0]["inputs"][method][name]
        torch.testing.assert_close(ours_B @ ours_A, B @ A, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours_A.T @ ours_A, A.T @ A, atol=1e-4, rtol=1e-4)
        assert torch.equal(ours_A, ranks[1]["inputs"][method][name][1])


def test_a_matrix_that_no_rank_holds_is_decomposed_like_the_whole(ranks):
    matrix = slow_spectrum()
    whole = truncated_svd(matrix, 8)
    best = (whole.U * whole.S) @ whole.Vh
    for results in ranks:
        U, S, Vh, following, error, norm = results["summands"]
        # Noise of norm 548 cancels to a matrix of norm 2.7: fp32 keeps 7 digits of the former.
        assert float(((U * S) @ Vh - best).norm() / best.norm()) < 1e-3
        assert following == pytest.approx(whole.next_value, rel=1e-3)
        assert error < 1e-2
        assert norm == pytest.approx(float(matrix.norm()), rel=0.02)


@pytest.mark.parametrize(("case", "count"), [("wide", 2), ("wide, uneven", 3)])
def test_ranks_add_up_products_of_wide_layers_and_start_like_one_process(case, count, ranks):
    """Uneven: rank 0 adds up two micro-batches' gradients, rank 1 never forms that of its one."""
    peft_model = adapted(wide_llama())
    batches = batches_for(rows=ROWS)[:count]
    report = lora_one.initialize(peft_model, batches, method="lora_one", measure_loss=False)
    expected = factors_of(peft_model)
    for results in ranks:
        factors, energies, sizes = results[case]
        for name, (B, A) in expected.items():
            ours = factors[name][0] @ factors[name][1]
            assert float((ours - B @ A).norm() / (B @ A).norm()) < 1e-3, name
        for energy, layer in zip(energies, report.layers, strict=True):
            assert energy == pytest.approx(layer.captured_energy, rel=0.05)  # an estimate
        assert max(sizes) == 192 * 768, "only the narrow layer's gradient is sent whole"
        assert sum(sizes) - max(sizes) < 768 * 768 / 2, "half of what each wide layer would be"


@pytest.mark.parametrize(
    ("case", "make", "count", "method"),
    [
        ("allocated", tiny_llama, 3, "lora_one"),
        ("allocated, wide", wide_llama, 2, "lora_ga"),
        ("allocated, sharded", tiny_llama, 2, "pissa"),
    ],
)
def test_all_ranks_allocate_what_one_process_does(case, make, count, method, ranks):
    expected, energy = allocated(make(), batches_for(rows=ROWS)[:count], method)
    assert ranks[0][case] == ranks[1][case]
    assert ranks[0][case][0] == expected
    assert ranks[0][case][1] == pytest.approx(energy, rel=0.05)


def test_batches_that_one_rank_cannot_use_stop_all_ranks(ranks):
    assert "another rank" in ranks[0]["refused"]
    assert "no batches" in ranks[1]["refused"]


def test_preconditioned_ddp_training_keeps_ranks_equal(ranks):
    first, second = ranks[0]["trained"], ranks[1]["trained"]
    start = adapted(tiny_llama())
    perturb(start, size=0.1)
    for name, (B, A) in factors_of(start).items():
        assert torch.equal(first[name][0], second[name][0])
        assert torch.equal(first[name][1], second[name][1])
        assert not torch.equal(first[name][0], B)
        assert not torch.equal(first[name][1], A)


def test_fully_sharded_base_gives_the_same_gradient(ranks):
    expected = lora_one.estimate_gradients(
        tiny_llama(), batches_for(rows=ROWS)[:2], target_modules=TARGETS["llama"]
    )
    assert [x.name for x in plain_layers(tiny_llama(), TARGETS["llama"])] == list(expected)
    for results in ranks:
        assert_close(results["fsdp"], expected)


@pytest.mark.parametrize("method", SHARDED_METHODS)
def test_a_fully_sharded_base_starts_like_a_whole_one(method, ranks):
    """Products of the factors, and every base weight, whatever the method reads and rewrites."""
    expected, loss = started(tiny_llama(), batches_for(rows=ROWS)[:2], method)
    for results in ranks:
        ours, our_loss = results["sharded"][method]
        assert our_loss == pytest.approx(loss, rel=1e-5)
        assert list(ours) == list(expected)
        for name, (product, W) in expected.items():
            torch.testing.assert_close(ours[name][0], product, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(ours[name][1], W, rtol=1e-3, atol=1e-4)


def test_a_sharded_model_needs_the_same_number_of_batches_on_every_rank(ranks):
    """Else a rank would wait for ever for a forward pass of another."""
    for results in ranks:
        assert (
            "one has 1 init batches with supervised tokens, another 2"
            in (results["sharded, uneven"])
        )


def test_a_sharded_weight_that_is_tied_is_not_rewritten(ranks):
    assert "is tied to another module's and sharded" in ranks[0]["sharded, tied"]
