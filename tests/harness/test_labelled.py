"""GLUE through the whole harness: a tiny T5 that writes labels, tiny encoders with a head."""

import json
from pathlib import Path

import pytest
import torch
from encoders import save_bert, save_roberta
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lora_one.errors import InputError
from lora_one.evaluation.head import head_outputs
from lora_one.harness.config.published import translate
from lora_one.harness.models.base import load_base
from lora_one.harness.plan import make_plan
from lora_one.tasks import create_task

from .evaluated import predictions

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def sst2() -> Path:
    if not (DATA / "glue_sst2").is_dir():
        pytest.skip("the real SST-2 rows are not in shared/data/glue_sst2 beside the repository")
    return DATA / "glue_sst2"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Rows of RTE and of STS-B, whose answer one word of the second sentence decides."""
    folder = tmp_path_factory.mktemp("pairs")
    for task in ("rte", "stsb"):
        (folder / task).mkdir()
    words = ["red", "green", "blue", "black"]
    for name, count in (("train", 64), ("dev", 8)):
        rte, stsb = ["sentence1\tsentence2\tlabel"], ["sentence1\tsentence2\tscore"]
        for n in range(count):
            follows = n % 2 == 0
            second = "red" if follows else "black"
            label = "entailment" if follows else "not_entailment"
            texts = f"it is {words[n % 4]} {n}\tit is {second}"
            rte.append(f"{texts}\t{label}")
            stsb.append(f"{texts}\t{5.0 * follows}")
        (folder / "rte" / f"{name}.tsv").write_text("\n".join(rte) + "\n")
        (folder / "stsb" / f"{name}.tsv").write_text("\n".join(stsb) + "\n")
    return folder


@pytest.fixture(scope="module")
def sentences(sst2) -> list[str]:
    return [line.split("\t")[0] for line in (sst2 / "train.tsv").read_text().splitlines()[:500]]


@pytest.fixture(scope="module")
def roberta_folder(tmp_path_factory) -> Path:
    texts = ["it is red", "it is green", "it is blue", "it is black"]
    return save_roberta(tmp_path_factory.mktemp("roberta"), texts)


@pytest.fixture
def settings(compose, tmp_path):
    """A run of a few steps."""

    def from_overrides(model: Path, data: Path, *overrides: str):
        return compose(
            f"model.name={model}",
            f"dataset.path={data}",
            f"output_dir={tmp_path / 'results'}",
            "model.real_batch_size=16",
            "model.per_device_batch_size=8",
            "peft.lora_r=4",
            "evaluation.batch_size=16",
            *overrides,
        )

    return from_overrides


def _folder(config, record) -> Path:
    return Path(config.output_dir) / record["run_id"]


def test_a_tiny_t5_learns_the_label_words_of_real_sst2_rows(settings, run, t5_folder, sst2):
    config = settings(
        t5_folder,
        sst2,
        "model=t5small",
        f"model.name={t5_folder}",
        "dataset=sst2",
        "dataset.train_rows=320",
        "dataset.validation_rows=32",
        "dataset.test_rows=24",
        "dataset.max_new_tokens=8",
        "model.max_steps=20",
        "model.warmup_steps=2",
        "model.learning_rate=1e-2",
    )
    record = run(config)
    losses = record["losses"]
    assert losses["validation"] < 0.7 * losses["base_validation"]
    metrics = record["metrics"]
    names = ("accuracy", "accuracy_exact", "accuracy_choice", "unparsed_exact", "unparsed_choice")
    assert all(0 <= metrics[name] <= 1 for name in names)
    assert metrics["unparsed_choice"] == 0
    rows = predictions(_folder(config, record))
    assert len(rows) == 24
    for row in rows:
        assert len(row["choice_log_probabilities"]) == 2
        best = max(range(2), key=row["choice_log_probabilities"].__getitem__)
        assert row["scores"]["choice"]["parsed"] == ("negative", "positive")[best]


@pytest.mark.parametrize("init", ["lora_one", "lora_ga", "pissa", "lora"])
def test_an_encoder_with_a_head_learns_and_its_export_gives_the_same_logits(
    settings, run, roberta_folder, pairs, init, capsys
):
    config = settings(
        roberta_folder,
        pairs / "rte",
        "model=roberta_base",
        f"model.name={roberta_folder}",
        "dataset=rte",
        f"init={init}",
        "model.max_steps=12",
        "model.learning_rate=1e-2",
    )
    record = run(config)
    assert record["architecture"] == "classification"
    assert record["losses"]["validation"] < record["losses"]["base_validation"]
    difference = record["export"]["largest_logit_difference"]
    assert difference < 1e-4
    said = (
        "gives the same logits" if difference == 0 else f"logits differ by at most {difference:.1e}"
    )
    assert said in capsys.readouterr().out
    metrics = record["metrics"]
    assert metrics["accuracy_exact"] == metrics["accuracy_choice"]
    assert metrics["unparsed"] == 0
    folder = _folder(config, record)
    assert {row["reply"] for row in predictions(folder)} <= set(create_task("rte").labels)

    # What a reader of the adapter's card does gives the predictions of the run.
    torch.manual_seed(1)  # another random head, which the adapter replaces
    base = AutoModelForSequenceClassification.from_pretrained(roberta_folder, num_labels=2)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    for example, row in zip(
        create_task("rte", path=pairs / "rte").load("test"), predictions(folder), strict=True
    ):
        with torch.no_grad():
            logits = model(**tokenizer(*example.texts, return_tensors="pt")).logits[0]
        expected = logits.log_softmax(-1).tolist()
        assert row["choice_log_probabilities"] == pytest.approx(expected, abs=1e-4)
        assert row["texts"] == list(example.texts)
        assert "prompt" not in row
    card = (folder / "adapter" / "README.md").read_text()
    assert "num_labels=2" in card
    assert "| texts | `'{sentence1}'`, `'{sentence2}'` |" in card
    assert "| prompt |" not in card


def test_a_score_is_learnt_by_regression(settings, run, roberta_folder, pairs):
    config = settings(
        roberta_folder,
        pairs / "stsb",
        "model=roberta_base",
        f"model.name={roberta_folder}",
        "dataset=stsb",
        "model.max_steps=12",
        "model.learning_rate=1e-2",
    )
    record = run(config)
    assert record["losses"]["validation"] < record["losses"]["base_validation"]
    assert record["primary_metric"] == "pearson"
    assert -1 <= record["metrics"]["pearson"] <= 1
    assert all(0 <= float(row["reply"]) <= 5 for row in predictions(_folder(config, record)))


def test_bert_reads_real_sst2_rows(settings, run, tmp_path, sst2, sentences):
    folder = save_bert(tmp_path / "bert", sentences)
    config = settings(
        folder,
        sst2,
        "model=roberta_base",
        f"model.name={folder}",
        "dataset=sst2",
        "dataset.train_rows=320",
        "dataset.validation_rows=64",
        "dataset.test_rows=32",
        "model.max_length=64",
        "model.max_steps=20",
        "model.learning_rate=5e-3",
    )
    record = run(config)
    assert record["losses"]["train"] < 0.75
    assert record["metrics"]["n"] == 32
    assert record["export"]["largest_logit_difference"] < 1e-4


def test_a_fully_trained_classifier_is_saved_whole(settings, run, roberta_folder, pairs):
    config = settings(
        roberta_folder,
        pairs / "rte",
        "model=roberta_base",
        f"model.name={roberta_folder}",
        "dataset=rte",
        "peft=full_ft",
        "init=lora",
        "model.max_steps=2",
    )
    record = run(config)
    saved = AutoModelForSequenceClassification.from_pretrained(_folder(config, record) / "model")
    assert saved.config.id2label == {0: "entailment", 1: "not_entailment"}


@pytest.mark.parametrize("pad", [None, -1, 5])
def test_the_head_of_a_decoder_reads_the_last_token_of_every_row(
    settings, llama_folder, copy_of, pairs, pad
):
    """Llama-2 has no padding token; another model may have another than its tokenizer."""
    folder = copy_of(llama_folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"pad_token_id": pad}))
    options = ("model.type=SequenceClassification", "dataset=rte")
    config = settings(folder, pairs / "rte", *options)
    plan = make_plan(config)
    model = load_base(plan.base, config.model, torch.device("cpu"), torch.float32)
    texts = [("it is red", "it is black"), ("it", "is"), ("it is red and blue", "it is green")]
    alone = [head_outputs(model, plan.tokenizer, [pair], batch_size=1)[0] for pair in texts]
    together = head_outputs(model, plan.tokenizer, texts, batch_size=3)
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)


def test_a_head_needs_labels(settings, run, roberta_folder, rows_folder):
    config = settings(
        roberta_folder,
        rows_folder,
        "model=roberta_base",
        f"model.name={roberta_folder}",
        "dataset=gsm8k",
    )
    with pytest.raises(InputError, match="dataset=gsm8k is no classification"):
        run(config)


def test_a_head_draws_no_samples_and_says_so_before_training(settings, run, roberta_folder, pairs):
    config = settings(
        roberta_folder,
        pairs / "rte",
        "model=roberta_base",
        f"model.name={roberta_folder}",
        "dataset=rte",
        "evaluation.temperature=0.8",
    )
    with pytest.raises(InputError, match="draws no samples"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_a_trained_head_is_evaluated_again_from_its_adapter(settings, run, roberta_folder, pairs):
    given = [
        "model=roberta_base",
        f"model.name={roberta_folder}",
        "dataset=rte",
        "model.max_steps=4",
        "model.learning_rate=1e-2",
    ]
    config = settings(roberta_folder, pairs / "rte", *given)
    first = run(config)
    adapter = _folder(config, first) / "adapter"
    again = settings(roberta_folder, pairs / "rte", *given, f"evaluate.adapter={adapter}")
    second = run(again)
    for one, other in zip(
        predictions(_folder(config, first)), predictions(_folder(again, second)), strict=True
    ):
        assert one["reply"] == other["reply"]
        assert one["choice_log_probabilities"] == pytest.approx(
            other["choice_log_probabilities"], abs=1e-4
        )
    translated, _ = translate([f"evaluate.adapter={adapter}"])
    assert "model.type=SequenceClassification" in translated
    as_text = settings(
        roberta_folder, pairs / "rte", *given, "model.type=CausalLM", f"evaluate.adapter={adapter}"
    )
    with pytest.raises(InputError, match=r"SEQ_CLS.*Add model.type=SequenceClassification"):
        run(as_text)


def test_a_head_with_the_labels_in_another_order_is_refused(
    settings, run, roberta_folder, copy_of, pairs
):
    folder = copy_of(roberta_folder)
    config = AutoConfig.from_pretrained(folder)
    config.id2label = {0: "NOT_ENTAILMENT", 1: "ENTAILMENT"}
    config.save_pretrained(folder)
    options = ("model=roberta_base", f"model.name={folder}", "dataset=rte", "train=none")
    with pytest.raises(InputError, match="head's classes are NOT_ENTAILMENT, ENTAILMENT; dataset"):
        run(settings(folder, pairs / "rte", *options))


def test_a_head_of_another_size_is_refused(settings, run, roberta_folder, pairs, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(roberta_folder, num_labels=5)
    model.save_pretrained(tmp_path / "five")
    AutoTokenizer.from_pretrained(roberta_folder).save_pretrained(tmp_path / "five")
    config = settings(
        tmp_path / "five",
        pairs / "rte",
        "model=roberta_base",
        f"model.name={tmp_path / 'five'}",
        "dataset=rte",
        "model.max_steps=1",
    )
    with pytest.raises(InputError, match="another size than the 2 outputs"):
        run(config)


@pytest.mark.parametrize("model", ["roberta_base", "roberta_large", "deberta_v3_base"])
def test_an_encoders_plan_needs_no_network(compose, model, pairs):
    from lora_one.harness.dry_run import foresee

    outlook = foresee(compose(f"model={model}", "dataset=rte", f"dataset.path={pairs / 'rte'}"))
    assert outlook.base.architecture == "classification"
    assert outlook.total > 100e6
    head = {"roberta_base": 768 * 768, "roberta_large": 1024**2, "deberta_v3_base": 768 * 768}
    assert outlook.trainable > head[model]
