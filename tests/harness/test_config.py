"""The schema: every file composes, every mistake is named, nothing is read that does not count."""

import json
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lora_one.errors import InputError
from lora_one.harness.config.schema import DIRECTIONS, GROUPS, Config, DatasetConfig
from lora_one.harness.config.task_options import parameters
from lora_one.harness.records import folder
from lora_one.harness.records.folder import run_id
from lora_one.harness.records.source import origin
from lora_one.tasks.registry import TASKS

CONF = Path(__file__).parents[2] / "conf"
FILES = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]

# peft files that replace the initialiser, and optimisers that need LoRA factors
NEEDS = {("peft", "full_ft"): ["init=lora"], ("peft", "adalora"): ["init=lora"]}


@pytest.mark.parametrize(("group", "choice"), FILES)
def test_every_file_composes_and_validates(compose, group, choice):
    config = compose(f"{group}={choice}", *NEEDS.get((group, choice), []))
    assert isinstance(config, Config)


def test_every_pair_of_initialiser_and_optimiser_composes(compose):
    inits = [choice for group, choice in FILES if group == "init"]
    optimizers = [choice for group, choice in FILES if group == "optimizer"]
    for init, optimizer in product(inits, optimizers):
        assert compose(f"init={init}", f"optimizer={optimizer}").optimizer.name == optimizer


def test_every_method_has_a_preset_of_its_own_name(compose):
    for direction, method in DIRECTIONS.items():
        assert compose(f"init={method}").init.direction == direction


BAD = {
    "init.direction=LoRA-Two": "Did you mean 'LoRA-One'?",
    "init=lora_two": "Did you mean 'lora_one'? Valid: corda, default",
    "initt=lora": "initt: nothing reads this key. Did you mean 'init'?",
    "model.learning_rat=1": "Did you mean 'learning_rate'?",
    "++model.learning_rat=1": "Did you mean 'learning_rate'?",
    "++init.weight=stable": "init.weight: nothing reads this key.",
    "++optimizer.damping=1e-3": "optimizer.damping: nothing reads this key.",
    "++wandb.nam=x": "Did you mean 'name'?",
    "peft.lora_r=0": "peft.lora_r=0: expected greater than 0",
    "peft.lora_r=2.5": "peft.lora_r=2.5: expected a valid integer",
    "peft.lora_dropout=1": "expected less than 1",
    "init.stable_gamma=0": "init.stable_gamma=0: expected greater than 0",
    "init.stable_gamma=null": "init.stable_gamma is needed by init.direction=LoRA-One",
    "init.bsz=null": "init.bsz is needed",
    "init.scale=stabel": "Did you mean 'stable'?",
    "model.schedule=cosin": "Did you mean 'cosine'?",
    "model.learning_rate=fast": "model.learning_rate='fast': expected a valid number",
    "model.learning_rate=nan": "model.learning_rate",
    "model.learning_rate=-1e-3": "expected greater than 0",
    "optimizer.name=adam": "Did you mean 'adamw'?",
    "seed=-1": "seed=-1: expected greater than or equal to 0",
    "seed=first": "seed='first': expected a valid integer",
    "model.real_batch_size=33": "is not a multiple of model.per_device_batch_size=32",
    "peft=full_ft": "Add init=lora",
    "init=null": "init=null: no such choice. ",
    "model=5": "model=5: no such choice. Valid: ",
    "model=[llama,t5base]": "model=[llama,t5base]: no such choice.",
    "model=[llama": "no viable alternative",
    "peft=adalora": "Add init=lora",
    "dataset.name=gsmk8": "dataset.name=gsmk8: no such benchmark. Did you mean 'gsm8k'?",
    "dataset.train_rows=0": "dataset.train_rows=0: expected greater than 0",
    "dataset.test_path=x": "dataset.test_path is read by dataset=",
    "++dataset.max_new_token=3": "nothing reads this key. Did you mean 'max_new_tokens'?",
    "a=[1": "no viable alternative",
    "model.learning_rate=${nowhere}": "'nowhere' not found",
    "seed=0,1": "argument 'seed=0,1'. Add -m to run every value",
    "seed=range(2)": "Sweep parameters 'seed=range(2)' requires --multirun. Add -m",
    "model.name=~/base": "the shell left ~ as it stands. Write the path out",
    "model.name=a b(1)": "Quote values",
}


@pytest.mark.parametrize(("override", "message"), BAD.items())
def test_bad_input_is_answered_with_what_would_be_right(compose, override, message):
    with pytest.raises(InputError) as caught:
        compose(override)
    assert message in str(caught.value)


CONTRADICTIONS = [
    (["init=lora_ga", "init.stable_gamma=auto"], "Give a number, or init=lora_one"),
    (["peft=dora", "optimizer=lorafa"], "Choose another optimizer"),
    (["peft.lora_target_modules=[]"], "names no layer"),
    (["dataset=meta_math", "dataset.order=null"], "order=null: expected 'published' or 'shuffled'"),
    (["dataset=meta_math", "dataset.order=shufled"], "Did you mean 'shuffled'"),
    (
        ["dataset=meta_math", "dataset.max_tokens=many"],
        "max_tokens='many': expected a valid integer",
    ),
    (["dataset=meta_math", "++dataset.max_token=9"], "Did you mean 'max_tokens'"),
    (["dataset=gsm8k", "dataset.strip_calculator=1"], "strip_calculator=1: expected a valid bool"),
    (["dataset=gsm8k", "dataset.order=published"], r"order is read by .*meta_math.* not by gsm8k"),
    (["peft=full_ft", "init=lora", "optimizer=preconditioned_adamw"], "Add optimizer=adamw"),
    (["peft=adalora", "init=lora", "optimizer=lorafa"], "Choose optimizer=adamw or loraplus"),
    (["peft=adalora", "init=lora", "peft.dora=true"], "exclude each other"),
    (["peft=adalora", "init=lora", "peft.use_rslora=true"], "peft.use_rslora=false"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(compose, overrides, message):
    with pytest.raises(InputError, match=message):
        compose(*overrides)


def test_keys_that_a_method_does_not_read_do_not_make_another_run(compose):
    for gamma in ("16", "auto"):
        same = compose("init=lora", f"init.stable_gamma={gamma}")
        assert run_id(same) == run_id(compose("init=lora"))
    assert run_id(compose("init=lora", "init.norm_clip=true")) == run_id(compose("init=lora"))
    assert run_id(compose("init.norm_clip=true")) != run_id(compose())
    assert run_id(compose("init.stable_gamma=16")) != run_id(compose())


def test_where_a_run_is_kept_is_not_part_of_what_it_is(compose):
    same = compose("output_dir=x", "tracking=wandb", "evaluation.batch_size=8")
    assert run_id(same) == run_id(compose())


def test_a_folder_is_the_same_by_every_path(compose, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["base", "./base", str(tmp_path / "base")]
    assert len({run_id(compose(f"model.name={name}")) for name in names}) == 1


def test_the_embedded_model_is_the_same_from_every_working_directory(
    compose, tmp_path, monkeypatch
):
    config = compose()
    monkeypatch.chdir(CONF.parent)
    name = run_id(config)
    monkeypatch.chdir(tmp_path)
    assert run_id(config) == name
    # A job has a copy of it, and may start anywhere.
    (tmp_path / "snapshot" / config.model.name).mkdir(parents=True)
    (tmp_path / "snapshot" / "source.json").write_text(json.dumps({"from": str(CONF.parent)}))
    monkeypatch.setattr(folder, "ROOT", tmp_path / "snapshot")
    monkeypatch.setattr(folder, "origin", partial(origin, tmp_path / "snapshot"))
    assert run_id(config) == name


def test_a_test_folder_is_the_same_by_every_path(compose, tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["rows", "./rows", str(tmp_path / "rows")]
    runs = [compose("dataset=meta_math", f"dataset.test_path={name}") for name in names]
    assert len({run_id(config) for config in runs}) == 1
    assert run_id(runs[0]) != run_id(compose("dataset=meta_math"))


@pytest.mark.parametrize(
    "override",
    ["seed=1", "model.learning_rate=1e-3", "peft.lora_r=4", "init=pissa", "dataset.loss_on=all"],
)
def test_what_changes_a_run_changes_its_name(compose, override):
    assert run_id(compose(override)) != run_id(compose())


def test_the_name_tells_method_rank_optimiser_rate_and_seed_apart(compose):
    name = run_id(compose("seed=7", "model.learning_rate=3e-4", "optimizer=preconditioned_adamw"))
    assert "-tiny_llama-lora_one-r8-preconditioned_adamw-lr0.0003-s7-" in name


def test_seeds_follow_the_one_seed_unless_set(compose):
    config = compose("seed=5", "init.seed=6")
    assert (config.dataset.seed, config.model.seed, config.init.seed) == (5, 5, 6)


def test_the_schema_describes_exactly_the_keys_of_the_yaml_files(compose):
    """A key in a YAML file that the schema lacks cannot exist; the reverse is tested here."""
    for group in ("model", "peft", "init"):
        files = (CONF / group).glob("*.yaml")
        used = {key for file in files for key in OmegaConf.load(file)} - {"defaults"}
        assert used == set(Config.model_fields[group].annotation.model_fields)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_benchmark_has_a_file_that_lists_its_options(name):
    common = set(DatasetConfig.model_fields)
    assert set(OmegaConf.load(CONF / "dataset" / f"{name}.yaml")) == common | set(parameters(name))


def test_every_file_of_a_benchmark_names_one_of_the_registry():
    names = {OmegaConf.load(file).name for file in (CONF / "dataset").glob("*.yaml")}
    assert names == set(TASKS)
