"""Input that cannot be used: one clear message, nothing left behind."""

from pathlib import Path

import pytest

from lora_one.errors import InputError


def overwrite(folder: Path, split: str, text: str) -> str:
    (folder / f"{split}.jsonl").write_text(text)
    return f"dataset.path={folder}"


GOOD = '{"question": "One and one?", "answer": "1 + 1 = 2\\n#### 2"}\n'

SPOILT = {
    "empty file": ("", r"train\.jsonl.*(empty|no row)"),
    "malformed line": (GOOD + "{oops\n", r"train\.jsonl.*2"),
    "no answer": (GOOD + GOOD + '{"question": "Why?"}\n', r"3.*answer"),
    "no number": (GOOD + '{"question": "Why?", "answer": "Because."}\n', r"2.*####"),
}


@pytest.mark.parametrize(("text", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_file_is_named_with_its_line(small, run, copy_of, rows_folder, text, message):
    config = small(overwrite(copy_of(rows_folder), "train", text))
    with pytest.raises(InputError, match=f"(?s){message}"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_rows_that_are_all_too_long(small, run):
    config = small("model.max_length=5")
    with pytest.raises(InputError, match=r"longer than max_length=5.*shortest has \d+"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_a_base_folder_without_weights(small, run, copy_of, llama_folder):
    folder = copy_of(llama_folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    config = small(f"model.name={folder}")
    with pytest.raises(InputError, match=r"no safetensors weights.*pytorch_model.bin"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_a_base_folder_that_is_not_there(small, run):
    with pytest.raises(InputError, match="there is no such folder"):
        run(small("model.name=./nowhere"))


def test_a_damaged_weights_file(small, run, copy_of, llama_folder):
    folder = copy_of(llama_folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    config = small(f"model.name={folder}")
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_embeddings_of_an_encoder_decoder(small, run, t5_folder):
    with pytest.raises(InputError, match="Choose peft=all or peft=qv"):
        run(small(f"model.name={t5_folder}", "peft=all_w_emb"))


def test_targets_that_are_not_linear_or_no_expression(small, run):
    for targets in ("[embed_tokens]", "'['", "[mlp]"):
        with pytest.raises(InputError, match=r"lora_target_modules.*Linear layers: down_proj"):
            run(small(f"peft.lora_target_modules={targets}"))


def test_more_ranks_than_micro_batches(small, run, monkeypatch):
    monkeypatch.setattr("lora_one.harness.data.rows.world_size", lambda: 2)
    with pytest.raises(InputError, match=r"init\.iters=1 micro-batches cannot be shared by 2"):
        run(small("init.iters=1", "model.per_device_batch_size=4"))


def test_an_output_folder_that_cannot_be_written(small, run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"output_dir=.* cannot be written"):
        run(small(f"output_dir={tmp_path / 'file' / 'results'}"))


def test_a_target_that_names_no_module(small, run):
    with pytest.raises(InputError, match=r"q_porj names no module.*Did you mean 'q_proj'"):
        run(small("peft.lora_target_modules=[q_porj]"))


def test_fewer_rows_than_the_one_step_gradient_wants(small, run):
    with pytest.raises(InputError, match=r"asks for 40 rows .* and there are 16"):
        run(small("init.iters=40"))
