"""One run, in this process: what it leaves behind, and what it must not leave behind."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_one.errors import InputError, NonFiniteError, RunHeldError
from lora_one.harness import export
from lora_one.harness.models.adapter import check_rank
from lora_one.harness.records.folder import run_id
from lora_one.harness.records.lease import acquire, lease_folder, look
from lora_one.harness.records.record import RunRecord
from lora_one.numerics.methods import METHODS

ROOT = Path(__file__).parents[2]
INITS = list(METHODS)


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_run_folder_holds_what_it_promises(small, run):
    config = small()
    record = run(config)
    folder = Path(config.output_dir) / record["run_id"]

    names = {path.name for path in folder.iterdir()}
    assert names == {
        "run.json",
        "config.yaml",
        "metrics.jsonl",
        "init.json",
        "predictions.jsonl",
        "adapter",
    }
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    written = json.loads((folder / "run.json").read_text())
    assert written == record
    assert written["status"] == "finished"
    assert written["method"] == "lora_one"
    assert set(written["phases"]) == {"load", "init", "train", "eval", "export"}
    for phase in written["phases"].values():
        assert phase["seconds"] >= 0
        assert phase["peak_memory_bytes"] > 0
    assert written["train"]["steps"] == 2
    assert written["train"]["tokens_per_second"] > 0
    assert written["metrics"]["n"] == 6
    assert written["provenance"]["versions"]["torch"] == torch.__version__
    assert written["model"]["fingerprint"].startswith("sha256:")
    assert len(written["data"]["train_row_ids_sha256"]) == 64
    assert OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) == config.model_dump()

    predictions = lines(folder, "predictions.jsonl")
    assert len(predictions) == 6
    assert all("reply" in row and "scores" in row for row in predictions)
    steps = [line["step"] for line in lines(folder, "metrics.jsonl")]
    assert steps == sorted(steps)
    report = json.loads((folder / "init.json").read_text())
    assert len(report["layers"]) == 14
    assert math.isfinite(report["loss_before"])


def test_a_run_that_another_process_is_doing_is_left_alone(small, run):
    config = small()
    folder = Path(config.output_dir) / run_id(config)
    with acquire(lease_folder(config.output_dir, run_id(config))):
        with pytest.raises(RunHeldError, match=f"another process is doing .* {os.getpid()}, since"):
            run(config)
        assert not folder.exists()


def test_a_run_that_another_process_finishes_meanwhile_is_not_done_again(small, run, monkeypatch):
    config = small("init=lora", "train=none")
    record = run(config)
    looks = iter([None])
    monkeypatch.setattr(RunRecord, "finished", property(lambda _: next(looks, record)))
    monkeypatch.setattr(RunRecord, "open", None)
    assert run(config) == record
    assert look(lease_folder(config.output_dir, run_id(config))).holder is None


def test_an_interrupted_run_says_so(small, run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_one.harness.stages.loop.train", interrupt)
    config = small()
    with pytest.raises(KeyboardInterrupt):
        run(config)
    record = json.loads((Path(config.output_dir) / run_id(config) / "run.json").read_text())
    assert (record["status"], record["error"]["phase"]) == ("preempted", "train")


def test_an_export_that_is_not_the_trained_model_fails(small, run, monkeypatch):
    """The check is real: an adapter with a wrong factor is not left behind as a result."""
    original = export.lora_one.export_adapter

    def spoilt(model, path, **options):
        report = original(model, path, **options)
        file = Path(path) / "adapter_model.safetensors"
        weights = {k: v + 0.1 if "lora_B" in k else v for k, v in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        return report

    monkeypatch.setattr(export.lora_one, "export_adapter", spoilt, raising=False)
    with pytest.raises(export.ExportError, match="gives logits that differ by"):
        run(small())


def test_a_finished_run_is_not_done_again(small, run, capsys):
    first = run(small())
    capsys.readouterr()
    assert run(small()) == first
    assert "already done" in capsys.readouterr().out


def test_an_unfinished_run_is_done_again_from_the_start(small, run):
    config = small()
    first = run(config)
    folder = Path(config.output_dir) / first["run_id"]
    (folder / "run.json").write_text(json.dumps(first | {"status": "running"}))
    second = run(config)
    assert second["metrics"]["validation_loss"] == first["metrics"]["validation_loss"]
    assert len(lines(folder, "metrics.jsonl")) == len(
        {str(x) for x in lines(folder, "metrics.jsonl")}
    )


def test_the_same_configuration_gives_the_same_weights(small, run, tmp_path):
    def weights(place):
        config = small(f"output_dir={tmp_path / place}")
        folder = Path(config.output_dir) / run(config)["run_id"]
        return load_file(folder / "adapter" / "adapter_model.safetensors")

    first, second = weights("a"), weights("b")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("optimizer", ["adamw", "preconditioned_adamw"])
@pytest.mark.parametrize("init", INITS)
def test_every_method_trains_and_exports_a_plain_lora_of_the_untouched_base(
    small, run, request, init, optimizer, architecture
):
    base = request.getfixturevalue(f"{architecture}_folder")
    rows = ["init.bsz=2", "init.iters=4"]
    config = small(f"init={init}", f"optimizer={optimizer}", f"model.name={base}", *rows)
    record = run(config)
    assert record["status"] == "finished"
    assert record["method"] == init
    assert math.isfinite(record["losses"]["validation"])
    # The harness reloads the export onto a fresh base; fp32 sums in another order differ by ~1e-6.
    assert record["export"]["largest_logit_difference"] < 1e-4


VARIANTS = {
    "dora": ["peft=dora"],
    "dora with an offset": ["peft=dora", "init=lora_ga"],
    "plain scaling": ["peft.use_rslora=false", "init=pissa"],
    "query and value": ["peft=qv"],
    "embeddings": ["peft=all_w_emb"],
    "embeddings with an offset": ["peft=qv_w_emb", "init=pissa"],
    "adalora": ["peft=adalora", "init=lora"],
    "loraplus": ["optimizer=loraplus"],
    "lorafa": ["optimizer=lorafa", "init=lora"],
    "riemannian": ["optimizer=riemannian"],
    "named targets": ["peft.lora_target_modules=[q_proj,down_proj]"],
    "regular expression": ["peft.lora_target_modules='.*layers.1.*_proj'"],
    "gradient checkpointing": ["model.gradient_checkpointing=true"],
    "loss on all tokens": ["dataset.loss_on=all"],
    "bfloat16 base": ["model.bf16=true"],
    "bfloat16 adapter with an offset": ["init.dtype=bf16", "init=olora"],
    "chosen gamma": ["init.stable_gamma=auto"],
    "dropout": ["peft.lora_dropout=0.1"],
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_trains_and_exports_a_plain_lora(small, run, overrides, llama_folder):
    config = small(*overrides)
    record = run(config)
    adapter = Path(config.output_dir) / record["run_id"] / "adapter"
    assert PeftConfig.from_pretrained(adapter).peft_type.value == "LORA"
    # bfloat16 has 8 bits of mantissa: logits of order 1 may differ in the third digit.
    tolerance = 5e-2 if "bf16" in str(overrides) else 1e-4
    assert record["export"]["largest_logit_difference"] < tolerance


def test_full_fine_tuning_moves_every_weight_and_saves_the_model(small, run, llama_folder):
    config = small("peft=full_ft", "init=lora")
    record = run(config)
    assert record["method"] == "full_ft"
    folder = Path(config.output_dir) / record["run_id"] / "model"
    base, trained = map(AutoModelForCausalLM.from_pretrained, (llama_folder, folder))
    assert trained.config.use_cache == base.config.use_cache
    before, after = base.state_dict(), trained.state_dict()
    projections = [name for name in before if name.endswith("_proj.weight")]
    assert all(not torch.equal(before[name], after[name]) for name in projections)


RELOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
auto = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}[sys.argv[1]]
model = PeftModel.from_pretrained(auto.from_pretrained(sys.argv[2]), sys.argv[3]).eval()
assert "lora_one" not in sys.modules
probe = torch.load(sys.argv[4], weights_only=True)
with torch.no_grad():
    torch.save(model(**probe).logits, sys.argv[5])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [("causal", ["init=lora_ga"]), ("seq2seq", ["init=pissa", "peft=dora"])],
)
def test_a_fresh_process_with_plain_peft_has_the_trained_models_logits(
    small, run, request, tmp_path, monkeypatch, architecture, overrides
):
    trained = {}
    original = export.export

    def remember(config, base, tokenizer, model, folder, probe):
        trained["probe"] = {name: tensor for name, tensor in probe.items() if name != "labels"}
        with torch.no_grad():
            trained["logits"] = model.eval()(**trained["probe"]).logits
        return original(config, base, tokenizer, model, folder, probe)

    monkeypatch.setattr(export, "export", remember)
    base = request.getfixturevalue("llama_folder" if architecture == "causal" else "t5_folder")
    config = small(f"model.name={base}", *overrides)
    adapter = Path(config.output_dir) / run(config)["run_id"] / "adapter"
    torch.save(trained["probe"], tmp_path / "probe.pt")
    files = [str(base), str(adapter), str(tmp_path / "probe.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, architecture, *files], check=True)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    # fp32 sums in another order, in logits of order 1
    assert (logits - trained["logits"]).abs().max() < 1e-4
    settings = PeftConfig.from_pretrained(adapter)
    assert (settings.r, settings.lora_alpha) == (2 * config.peft.lora_r, 32)


def test_an_adapter_cut_to_a_rank_says_what_it_lost(small, run):
    exact = run(small("init=lora_ga"))["export"]
    cut = run(small("init=lora_ga", "export.rank=4"))["export"]
    assert (exact["rank"], exact["truncation_error"]) == (8, 0.0)
    assert cut["rank"] == 4
    # After two steps B A and B0 A0 almost cancel: what is cut is a good part of what there is.
    assert 0 < cut["truncation_error"] < 1
    assert cut["largest_logit_difference"] > exact["largest_logit_difference"]


def test_a_loss_that_explodes_ends_the_run_as_failed_and_exports_nothing(small, run):
    config = small(
        "model.learning_rate=1e30", "model.max_steps=6", "model.epochs=3", "model.eval_epochs=3"
    )
    with pytest.raises(NonFiniteError, match=r"step \d+: .*the (output|weight) of model\.layers"):
        run(config)
    (folder,) = Path(config.output_dir).glob("arithmetic-*")
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["error"]["type"] == "NonFiniteError"
    assert record["error"]["phase"] == "train"
    assert not (folder / "adapter").exists()


def test_a_base_with_a_nan_is_caught_before_training(small, run, copy_of, llama_folder):
    folder = copy_of(llama_folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = small(f"model.name={folder}")
    with pytest.raises(NonFiniteError, match=f"base model.*the weight of {name}"):
        run(config)
    (folder,) = Path(config.output_dir).glob("arithmetic-*")
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


def test_an_export_that_cannot_work_fails_before_the_training(small, run, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(export.lora_one, "export_adapter", broken, raising=False)
    config = small()
    with pytest.raises(RuntimeError, match="disk on fire"):
        run(config)
    (folder,) = Path(config.output_dir).glob("arithmetic-*")
    record = json.loads((folder / "run.json").read_text())
    assert record["error"]["phase"] == "export"
    assert {line["step"] for line in lines(folder, "metrics.jsonl")} == {0}


def test_micro_batches_do_not_change_the_step(small, run):
    """Token-weighted: 8 rows at once and 4 x 2 rows accumulated are the same step."""
    uneven = ("dataset.train_rows=13", "model.logging_steps=1")  # the last step has 5 rows
    whole = run(small(*uneven, "model.per_device_batch_size=8"))
    parts = run(small(*uneven, "model.per_device_batch_size=2"))
    # The two differ by the order of fp32 sums, which AdamW's first steps amplify a little.
    assert parts["losses"]["validation"] == pytest.approx(whole["losses"]["validation"], abs=1e-4)
    assert parts["losses"]["train"] == pytest.approx(whole["losses"]["train"], abs=1e-4)


def test_each_seed_changes_what_it_should_and_nothing_else(small, run):
    def facts(*overrides):
        record = run(small("init=lora", *overrides))
        return record["data"]["train_row_ids_sha256"], record["losses"]["validation"]

    rows, loss = facts()
    for_data, for_init, for_training = (
        facts("dataset.seed=1"),
        facts("init.seed=1"),
        facts("model.seed=1"),
    )
    assert for_data[0] != rows
    assert for_init[0] == for_training[0] == rows
    assert len({loss, for_data[1], for_init[1], for_training[1]}) == 4


def test_a_start_is_computed_once_for_all_learning_rates(small, run):
    """And a run that found its start in the cache ends with the same weights."""

    def weights(config):
        record = run(config)
        folder = Path(config.output_dir) / record["run_id"]
        report = json.loads((folder / "init.json").read_text())
        return load_file(folder / "adapter" / "adapter_model.safetensors"), report["cached"]

    for init in ("init=lora_ga", "init=pissa"):
        first, cached = weights(small(init))
        assert not cached
        _, cached = weights(small(init, "model.learning_rate=1e-4"))
        assert cached
        for place in Path(small().output_dir).glob("arithmetic-*"):
            (place / "run.json").unlink(missing_ok=True)
        again, cached = weights(small(init))
        assert cached
        assert all(torch.equal(first[name], again[name]) for name in first)
    for changed in ("init.stable_gamma=3", "dataset.seed=1", "peft.lora_alpha=8"):
        assert not weights(small("init=lora_ga", changed))[1]


def test_verbose_shows_every_layer(small, run, capsys):
    run(small("verbose=true"))
    assert capsys.readouterr().out.count("_proj") == 14


def test_weights_and_biases_offline_gets_the_same_facts(small, run, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small("tracking=wandb", "wandb.name=mine")
    record = run(config)
    folder = Path(config.output_dir) / record["run_id"]
    assert record["status"] == "finished"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_rank_above_the_layer_names_the_layer_and_what_would_do(small, run):
    with pytest.raises(InputError, match=r"k_proj, which is 16 x 32.*largest usable rank is 16"):
        run(small("peft.lora_r=17", "init=lora"))
    with pytest.raises(InputError, match=r"LoRA-GA takes 2r.*largest usable rank is 8"):
        run(small("peft.lora_r=9", "init=lora_ga"))
    with pytest.raises(InputError, match=r"gate, which is 1 x 32.* No rank fits; name other"):
        check_rank(small("peft.lora_r=1", "init=lora_ga"), {"mlp.gate": (1, 32)})


def test_files_are_utf_8_whatever_the_locale_says(tmp_path):
    """A name or a reply may hold any letter, and a batch job often has the C locale."""
    program = (
        "from pathlib import Path\n"
        "from lora_one.harness.records.folder import write_atomically\n"
        f"write_atomically(Path({str(tmp_path / 'file')!r}), chr(233) + chr(8364))\n"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | plain, check=True)
    assert (tmp_path / "file").read_bytes() == "é€".encode()
