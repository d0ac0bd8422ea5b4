"""``diagnostics=``: what is refused, what is logged, and that the training does not notice."""

import json

import pytest
import torch

from lora_one.errors import InputError
from lora_one.harness.dry_run import show_plan
from lora_one.harness.records.folder import run_id
from lora_one.harness.training.diagnostics import choose_layers
from lora_one.reports.records import find_runs
from lora_one.reports.traces import read_trace

from .long_run import folder_of

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{block}.{kind}" for block in range(3) for kind in KINDS]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, []),
        ("all", range(12)),
        (1, [6]),
        (2, [0, 11]),
        (4, [0, 4, 7, 11]),
        (12, range(12)),
        (["q_proj"], [0, 4, 8]),
        (["v_proj", "self_attn.q_proj"], [0, 1, 4, 5, 8, 9]),  # in the model's order
        (["layers.1.*"], [4, 5, 6, 7]),
        (["layers.[02].mlp.*"], [2, 3, 10, 11]),
        (["model.layers.2.mlp.up_proj"], [10]),
    ],
)
def test_layers_are_chosen_by_number_name_ending_or_pattern(wanted, chosen):
    assert choose_layers(wanted, NAMES) == [NAMES[at] for at in chosen]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["q_projj"], "q_projj names no adapted layer. Did you mean 'q_proj'?"),
        (["proj"], "Adapted layers: down_proj, q_proj, up_proj, v_proj, such as model.layers.0."),
        (["model.layers.1.mlp.upproj"], "Did you mean 'model.layers.1.mlp.up_proj'?"),
        (13, "the adapter changes 12 layers. Give at most 12, or diagnostics.layers=all."),
    ],
)
def test_a_layer_that_is_not_there_is_answered_with_the_nearest(wanted, message):
    with pytest.raises(InputError) as error:
        choose_layers(wanted, NAMES)
    assert message in str(error.value)


ON = "diagnostics.layers=2"
REFUSED = {
    ("diagnostics.layers=0",): "diagnostics.layers=0: expected greater than 0",
    ("diagnostics.layers=[]",): "names no layer. Write null, 4, all or a list",
    ("diagnostics.layers=q_proj",): "diagnostics.layers='q_proj': expected",
    ("diagnostics.layer=2",): "Did you mean 'layers'?",
    ("diagnostics.rank=2",): "diagnostics.rank=2 has no effect without diagnostics.layers",
    (ON, "diagnostics.rank=9"): "diagnostics.rank=9: the factors have peft.lora_r=8 directions",
    (ON, "peft=full_ft", "init=lora"): "factors B and A, and peft=full_ft has none",
    (ON, "peft=adalora", "init=lora"): "and peft=adalora has P diag",
    (ON, "train=none"): "diagnostics follow a training, and train=none has none",
    (ON, "model=tiny_llama", "evaluate.adapter=x"): "and evaluate.adapter has none",
    (ON, "parallelism=zero2"): "Give parallelism=ddp or fsdp2",
}


@pytest.mark.parametrize("given", REFUSED, ids=" ".join)
def test_what_cannot_be_diagnosed_is_refused(given, compose):
    with pytest.raises(InputError) as error:
        compose(*given)
    assert REFUSED[given] in str(error.value)


@pytest.mark.parametrize("planned", ["dry run", "run"])
def test_a_layer_that_is_not_there_is_found_before_anything_is_written(
    small, run, planned, tmp_path
):
    config = small("diagnostics.layers=[k_prj]")
    with pytest.raises(InputError, match="Did you mean 'k_proj'"):
        show_plan([config]) if planned == "dry run" else run(config)
    with pytest.raises(InputError, match="rows=17: there are 16 training rows"):
        run(small(ON, "diagnostics.rows=17"))
    assert not (tmp_path / "results").exists()


def test_looking_is_no_part_of_what_a_run_is(compose):
    assert run_id(compose(ON, "diagnostics.rows=4")) == run_id(compose())


def logged(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(key.startswith("update_norm/") for key in line)]


@pytest.mark.parametrize("init", ["lora", "lora_one"])
def test_a_run_logs_its_chosen_layers_and_is_otherwise_the_same(small, run, init, capsys):
    """At the start, the first step, every third and the last of four."""
    more = [f"init={init}", "model.max_steps=4", "model.warmup_steps=0", "dataset.train_rows=32"]
    plain = small(*more, "output_dir=" + small().output_dir + "/plain")
    run(plain)
    config = small(*more, ON, "diagnostics.every_steps=3")
    record = run(config)
    folder = folder_of(config)
    names = record["diagnostics"]["layers"]
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    lines = logged(folder)
    assert [line["step"] for line in lines] == [0, 1, 3, 4]
    kinds = ["principal_angle_B", "principal_angle_A", "update_norm", "update_singular_values"]
    assert all(list(line)[1:] == [f"{k}/{n}" for n in names for k in kinds] for line in lines)
    for name in names:
        B, A, norms, spectra = ([line[f"{kind}/{name}"] for line in lines] for kind in kinds)
        assert (norms[0], any(spectra[0])) == (0.0, False)
        assert norms == sorted(norms)
        assert norms == pytest.approx([sum(s * s for s in one) ** 0.5 for one in spectra], rel=1e-5)
        if init == "lora":
            assert B[0] is None
            assert all(0 < angle <= 90 for angle in B[1:])
            assert A[0] > 30
        else:
            # The start is in the spaces; a step of AdamW, much like a sign, leads out of them.
            assert max(A[0], B[0]) < 0.03
            assert min(A[1], B[1]) > 1
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (folder_of(plain) / weights).read_bytes()
    assert record["phases"]["diagnostics"]["seconds"] > 0

    (found,) = find_runs(folder.parent)
    trace = read_trace(found.folder, "accuracy")
    assert list(trace.update_norms) == list(trace.update_spectra) == names
    assert trace.angles["B"][names[0]].x.tolist() == [0, 1, 3, 4][init == "lora" :]

    capsys.readouterr()
    run(config)
    assert "note:" not in capsys.readouterr().out
    run(small(*more, ON))
    said = capsys.readouterr().out
    assert f"note: {record['run_id']} is finished without the diagnostics asked for (others" in said


def test_every_method_is_compared_with_the_same_gradient(small, run, monkeypatch):
    """That of the base model, also where the start changes the base weights."""
    seen = []

    def measurement(_model, _names, spaces):
        seen.append(spaces)
        return dict

    monkeypatch.setattr("lora_one.harness.stages.measurement", measurement)
    for init in ("pissa", "lora_one"):
        run(small(f"init={init}", ON, "diagnostics.rows=6", "diagnostics.rank=2"))
    pissa, lora_one = seen
    assert len(pissa) == 2
    for name, space in pissa.items():
        assert space.U.shape[1] == space.V.shape[1] == 2
        assert torch.equal(space.U, lora_one[name].U)
        assert torch.equal(space.V, lora_one[name].V)
