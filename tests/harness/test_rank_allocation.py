"""``init.rank_allocation``: names, refusals, and one run from the plan to a plain PEFT adapter."""

from pathlib import Path

import pytest
from peft import PeftConfig

from lora_one.errors import InputError
from lora_one.harness.dry_run import show_plan
from lora_one.harness.records.folder import NEUTRAL, run_id
from lora_one.reports.records import find_runs
from lora_one.reports.table import summarise

ENERGY = "init.rank_allocation=energy"


def test_equal_ranks_add_nothing_to_the_name_of_a_run(compose):
    """Runs of configurations without the key are found again."""
    config = compose("init=lora")
    assert config.init.rank_allocation == NEUTRAL["init.rank_allocation"] == "uniform"
    assert run_id(config) == run_id(compose("init=lora", "init.rank_allocation=uniform"))
    assert "-lora-r8_energy-adamw-" in run_id(compose("init=lora", ENERGY))


def test_rows_of_the_gradient_count_where_it_is_taken(compose):
    other = "init.iters=4"
    assert run_id(compose("init=lora", other)) == run_id(compose("init=lora"))
    assert run_id(compose("init=lora", ENERGY, other)) != run_id(compose("init=lora", ENERGY))
    assert run_id(compose("init=pissa", ENERGY, other)) == run_id(compose("init=pissa", ENERGY))
    assert compose("init=lora", "train=none", ENERGY).learns
    assert not compose("init=pissa", "train=none", ENERGY).learns


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft=full_ft", "init=lora"], "peft=full_ft has no ranks"),
        (["peft=adalora", "init=lora"], "adalora allocates ranks by itself"),
        (["evaluate.adapter=here", "model.name=base"], "is there already, with its ranks"),
        (["init=eva"], "init.direction=EVA looks at the layers' inputs"),
        (["init=lora", "init.bsz=null"], "init.bsz is needed by init.rank_allocation=energy"),
    ],
)
def test_what_has_no_ranks_to_allocate_is_refused(compose, overrides, message):
    with pytest.raises(InputError, match=message):
        compose(ENERGY, *overrides)


def test_an_unknown_rule_is_answered_with_the_valid_ones(compose):
    with pytest.raises(InputError, match="expected 'uniform' or 'energy'"):
        compose("init.rank_allocation=spectral")


def test_from_the_plan_to_the_table(small, run, read, forks, capsys):
    """The command line once with ranks by energy, then the uniform run, and both in one table."""
    config = small("init=lora", ENERGY)
    show_plan([config])
    assert "1 to 16, by energy, within the parameters of rank 4" in capsys.readouterr().out
    child = forks.start(
        *["init=lora", ENERGY, f"model.name={config.model.name}"],
        *[f"dataset.path={config.dataset.path}", f"output_dir={config.output_dir}"],
        *["dataset.max_new_tokens=4", "dataset.train_rows=16", "model.max_steps=2"],
        *["model.real_batch_size=8", "model.per_device_batch_size=4", "peft.lora_r=4"],
        "evaluation.batch_size=8",
    )
    assert child.wait() == 0, child.said

    folder = Path(config.output_dir) / run_id(config)
    record, report = read(folder, "run.json"), read(folder, "init.json")
    allocation = report["rank_allocation"]
    assert f"ranks: {allocation['summary']}" in child.said
    assert {layer["name"]: layer["rank"] for layer in report["layers"]} == allocation["ranks"]
    assert allocation["captured_energy"] > allocation["uniform_energy"]
    assert allocation["parameters"] <= allocation["budget"]
    low, high = min(allocation["ranks"].values()), max(allocation["ranks"].values())
    assert record["export"]["rank_range"] == [low, high]
    assert low < high
    assert (
        f"A plain LoRA of ranks {low} to {high} for" in (folder / "adapter/README.md").read_text()
    )
    exported = PeftConfig.from_pretrained(folder / "adapter")
    for name, rank in allocation["ranks"].items():
        assert exported.rank_pattern.get(name, exported.r) == rank
    assert record["export"]["largest_logit_difference"] < 1e-4

    run(small("init=lora"))
    results = summarise(find_runs(Path(config.output_dir)))
    column = results.columns.index("init.rank_allocation")
    assert sorted(row[column] for row in results.rows) == ["energy", "uniform"]
    assert "init.bsz" not in results.columns, "it follows from the rule"


def test_a_run_without_the_key_is_grouped_with_uniform_ones(small, run):
    """A record that was written before the key was there is one of equal ranks."""
    for seed in (0, 1):
        config = small("init=lora", "train=none", f"seed={seed}")
        run(config)
    file = Path(config.output_dir) / run_id(config) / "config.yaml"
    kept = [line for line in file.read_text().splitlines() if "rank_allocation" not in line]
    file.write_text("\n".join(kept) + "\n")
    keys = [set(run.settings) for run in find_runs(Path(config.output_dir))]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("method", ["lora_ga", "pissa"])
def test_methods_that_change_the_base_export_exactly(small, run, method):
    record = run(small(f"init={method}", ENERGY, "train=none"))
    assert record["export"]["largest_logit_difference"] < 1e-4
    assert record["export"]["rank_range"][0] < record["export"]["rank_range"][1]
