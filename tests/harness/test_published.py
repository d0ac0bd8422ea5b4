"""The official repositories' command lines mean what they meant there."""

import shlex
from pathlib import Path

import pytest

from lora_one.errors import InputError
from lora_one.harness.config.compose import composer, expand
from lora_one.harness.config.published import translate

CONF = Path(__file__).parents[2] / "conf"

SHORT = "++init.direction=LoRA-One"
LONG = (
    "++dataset_name=meta_math +init=gradient ++peft.lora_r=8 +peft=all "
    'wandb.name="enter-name-here" ++init.weight="stable" peft.use_rslora=True peft.lora_alpha=16 '
    '++init.stable_gamma=64 model.learning_rate=2e-5 ++seed=0 ++init.direction="LoRA-One"'
)


def test_the_short_line_is_the_embedded_run_with_lora_one(compose):
    config = compose(*shlex.split(SHORT))
    assert config.method == "lora_one"
    assert config.model.name == "data/tiny_llama"
    assert config.dataset.name == "arithmetic"


def test_the_long_line_is_llama_2_on_metamathqa(compose):
    config = compose(*shlex.split(LONG))
    assert config.method == "lora_one"
    assert config.model.name == "meta-llama/Llama-2-7b-hf"
    assert config.dataset.name == "meta_math"
    assert (config.dataset.train_rows, config.dataset.validation_rows) == (100_000, 10_000)
    assert (config.peft.lora_r, config.peft.lora_alpha, config.peft.use_rslora) == (8, 16, True)
    assert config.peft.lora_target_modules == "all"
    assert (config.init.scale, config.init.stable_gamma) == ("stable", 64)
    assert (config.init.bsz, config.init.iters, config.init.max_length) == (1, 8, 1024)
    assert (config.model.learning_rate, config.model.real_batch_size) == (2e-5, 32)
    assert (config.model.max_length, config.model.bf16) == (1024, True)
    assert config.wandb.name == "enter-name-here"
    assert (config.tracking, config.seed) == ("wandb", 0)


SINGLE = (
    "++dataset_name=meta_math model.epochs=1 model.eval_epochs=1 ++model.saving=true "
    '+init=gradient ++peft.lora_r=8 +peft=all wandb.name="enter-name-here" ++init.weight="stable" '
    "peft.use_rslora=True peft.lora_alpha=16 ++init.stable_gamma=128 model.learning_rate=2e-4 "
    '++seed=9 ++init.direction="LoRA-One"'
)
MULTI = (
    "model.epochs=3 model.eval_epochs=3 ++model.saving=false model.real_batch_size=16 "
    '++dataset_name=commonsense_reasoning +init=gradient ++init.direction="LoRA-One" '
    "++init.max_length=256 ++model.max_length=256 ++peft.lora_r=16 +peft=qv "
    'wandb.name="enter-name-here" ++init.scale="stable" peft.use_rslora=True peft.lora_alpha=16 '
    "++peft.lora_dropout=0.05 ++init.stable_gamma=128 model.learning_rate=5e-5 ++seed=42"
)


def test_the_single_gpu_line_of_the_readme(compose):
    config = compose(*shlex.split(SINGLE))
    assert (config.method, config.dataset.name, config.seed) == ("lora_one", "meta_math", 9)
    assert config.model.name == "meta-llama/Llama-2-7b-hf"
    assert (config.init.stable_gamma, config.model.learning_rate) == (128, 2e-4)


def test_the_multi_gpu_line_of_the_readme(compose):
    config = compose(*shlex.split(MULTI))
    assert (config.method, config.dataset.name, config.seed) == ("lora_one", "commonsense", 42)
    assert config.model.name == "meta-llama/Llama-2-7b-hf"
    assert (config.peft.lora_r, config.peft.lora_dropout) == (16, 0.05)
    assert (config.model.epochs, config.model.real_batch_size) == (3, 16)
    assert (config.init.max_length, config.model.max_length) == (256, 256)
    assert (CONF.parent / "accelerate_config.yaml").is_file()


def test_the_damping_of_the_earlier_repository(compose):
    config = compose("optimizer=preconditioned_adamw", "++model.prec_reg=1e-4")
    assert config.optimizer.damping == 1e-4


def test_every_change_is_said_in_one_line():
    _, notes = translate(shlex.split(LONG))
    for said in ("dataset=meta_math", "init.weight=stable has no effect", "init=lora_one", "llama"):
        assert sum(said in note for note in notes) >= 1
    assert all("\n" not in note for note in notes)


@pytest.mark.parametrize("preset", ["default", "svd", "gradient", "lora", "pissa", "lora_ga"])
def test_the_direction_decides_the_method_whatever_preset_is_in_force(compose, preset):
    config = compose(f"init={preset}", "++init.direction=LoRA-One")
    assert config.init == compose("init=lora_one").init


def test_an_explicit_value_survives_the_change_of_preset(compose):
    config = compose("init=lora_ga", "init.stable_gamma=7", "init.direction=LoRA-One")
    assert (config.method, config.init.stable_gamma) == ("lora_one", 7)


@pytest.mark.parametrize("form", ["init=pissa", "+init=pissa", "++init=pissa"])
def test_groups_are_understood_with_and_without_plus(compose, form):
    assert compose(form).method == "pissa"


@pytest.mark.parametrize(
    ("name", "method"), [("default", "lora"), ("svd", "pissa"), ("gradient", "lora_ga")]
)
def test_published_preset_names(compose, name, method):
    assert compose(f"init={name}").method == method


def test_published_loraplus_key(compose):
    assert compose("peft.use_loraplus=True").optimizer.name == "loraplus"
    assert compose("peft.use_loraplus=False").optimizer.name == "adamw"


def test_a_given_model_is_kept():
    overrides, _ = translate(["++dataset_name=meta_math", "model=mistral"])
    assert "model=mistral" in overrides
    assert "model=llama" not in overrides


def test_commands_in_our_own_spelling_pass_unchanged():
    ours = ["init=lora,pissa", "model.learning_rate=1e-3", "seed=0,1,2", "hydra.verbose=true"]
    assert translate(ours) == (ours, [])


@pytest.mark.parametrize(
    "sweep", ["LoRA-GA,LoRA-One", "choice(LoRA-GA,LoRA-One)", '"LoRA-GA","LoRA-One"']
)
def test_a_sweep_over_directions_is_a_sweep_over_presets(compose, sweep):
    with composer(CONF):
        points, _ = expand([f"init.direction={sweep}"])
    expected = [compose("init=lora_ga"), compose("init=lora_one")]
    assert [point.config for point in points] == expected


def test_each_benchmark_of_a_sweep_keeps_its_own_model():
    with composer(CONF):
        points, _ = expand(["++dataset_name=meta_math,arithmetic"])
    models = {point.config.dataset.name: point.config.model.name for point in points}
    assert models == {"meta_math": "meta-llama/Llama-2-7b-hf", "arithmetic": "google-t5/t5-base"}


def test_a_sweep_has_each_run_once_and_in_order():
    with composer(CONF):
        points, _ = expand(["init=lora,pissa,lora", "init.stable_gamma=1,2"])
    assert [point.config.method for point in points] == ["lora", "pissa"]


@pytest.mark.parametrize("empty", ["seed=range(3,3)", "init=glob(lora_two*)"])
def test_a_sweep_without_a_value_is_refused(empty):
    with composer(CONF), pytest.raises(InputError, match="no value to run") as caught:
        expand(["peft.lora_r=4,8", empty])
    assert str(caught.value).startswith(f"{empty}: ")
