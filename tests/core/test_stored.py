"""A stored adapter is read, described, rewritten and judged without a model."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import nn

import lora_one
from lora_one.adapters.command import main
from lora_one.adapters.stored import pattern_key, pattern_value, read_stored

from .tiny import Endings, adapted, logits, perturb, tiny_llama

ALL_KINDS = {
    "targets": ["embed_tokens", "q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6},
    "alpha_pattern": {"q_proj": 3},
}


def stored(path, peft_model=None, **options):
    """Return the folder of an adapter that was trained a little, and its model."""
    if peft_model is None:
        peft_model = adapted(tiny_llama(mlp_bias=True), **options)
    perturb(peft_model, size=0.1)
    peft_model.save_pretrained(path, save_embedding_layers=False)
    return path, peft_model


def described(capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, message, *arguments):
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def settings(path):
    return json.loads((path / "adapter_config.json").read_text())


def change_settings(path, **changes):
    (path / "adapter_config.json").write_text(json.dumps({**settings(path), **changes}))


def products(peft_model):
    """Return ``s B A`` of every adapted layer as PEFT forms it, embeddings as (features, words)."""
    found = {}
    for name, module in peft_model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach().double()
            found[name] = delta.T if "embed" in name else delta.flatten(1)
    return found


@pytest.mark.parametrize("use_rslora", [False, True])
def test_inspect_describes_the_products_that_peft_forms(use_rslora, tmp_path, capsys):
    path, peft_model = stored(tmp_path / "a", use_rslora=use_rslora, **ALL_KINDS)
    facts = described(capsys, path)
    dense = products(peft_model)
    assert {layer["name"] for layer in facts["layers"]} == set(dense)
    for layer in facts["layers"]:
        S = torch.linalg.svdvals(dense[layer["name"]])
        p = S / S.sum()
        assert layer["shape"] == list(dense[layer["name"]].shape)
        assert layer["norm"] == pytest.approx(float(dense[layer["name"]].norm()), rel=1e-5)
        assert layer["singular_values"] == pytest.approx(S[: layer["rank"]].tolist(), rel=1e-4)
        # The dense product is formed in fp32, which leaves values of 1e-7 where there are zeros.
        entropy = -(p[: layer["rank"]] * p[: layer["rank"]].log()).sum()
        assert layer["effective_rank"] == pytest.approx(float(entropy.exp()), rel=1e-4)
    norms = [layer["norm"] for layer in facts["layers"]]
    assert norms == sorted(norms, reverse=True)
    assert facts["ranks"] == {"4": 4, "2": 2, "6": 1}
    tensors = load_file(path / "adapter_model.safetensors").values()
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert facts["bytes"] == sum(tensor.nbytes for tensor in tensors)


def test_inspect_reads_convolutions(tmp_path, capsys):
    class Picture(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

    config = LoraConfig(r=2, target_modules=["conv"])
    path, peft_model = stored(tmp_path / "a", get_peft_model(Picture(), config))
    (layer,) = described(capsys, path)["layers"]
    assert (layer["kind"], layer["shape"]) == ("convolution", [5, 27])
    assert layer["norm"] == pytest.approx(float(products(peft_model)["conv"].norm()), rel=1e-5)
    assert main(["export", str(path), str(tmp_path / "b"), "--rank", "1"]) == 0
    loaded = PeftModel.from_pretrained(Picture(), tmp_path / "b")
    S = torch.linalg.svdvals(products(peft_model)["conv"])
    error = (products(loaded)["conv"] - products(peft_model)["conv"]).norm()
    assert float(error) == pytest.approx(float(S[1]), rel=1e-4)


def test_the_table_says_what_a_reader_wants_to_know(tmp_path, capsys, llama_batches):
    peft_model = adapted(tiny_llama(), use_rslora=True, use_dora=True, modules_to_save=["lm_head"])
    lora_one.initialize(peft_model, llama_batches, method="lora_one", stable_gamma=16)
    lora_one.export_adapter(peft_model, tmp_path / "a")
    change_settings(tmp_path / "a", base_model_name_or_path="some/base", revision="abc")
    assert main(["inspect", str(tmp_path / "a"), "--layers", r"layers\.1.*q_proj"]) == 0
    out = capsys.readouterr().out
    for line in (
        "base       some/base at abc",
        f"method     lora_one, scale stable, stable_gamma 16.0 (lora-one {lora_one.__version__})",
        "kind       rsLoRA with DoRA (the norms below are before its magnitudes)",
        "rank       4",
        "scaling    s = alpha / sqrt(r): 4",
        "targets    down_proj, q_proj, v_proj",
        "in full    lm_head",
        "beside     7 more tensors",
        "dtype      float32",
    ):
        assert line in out
    table = out.splitlines()[-2:]
    assert table[1].split()[:5] == ["model.layers.1.self_attn.q_proj", "32", "x", "32", "4"]
    assert len(table[0]) <= 100


def test_export_records_the_start(tmp_path, llama_batches):
    for method, expected in (
        ("lora_ga", {"scale": "stable", "stable_gamma": 128.0, "norm_clip": False, "seed": 3}),
        ("pissa", {"norm_clip": False, "seed": 3}),
    ):
        peft_model = adapted(tiny_llama())
        lora_one.initialize(peft_model, llama_batches, method=method, seed=3)
        lora_one.export_adapter(peft_model, tmp_path / "a")
        origin = read_stored(tmp_path / "a").origin
        assert origin == {"version": lora_one.__version__, "method": method, **expected}
    peft_model.save_pretrained(tmp_path / "b")
    assert read_stored(tmp_path / "b").origin is None


def test_inspect_imports_neither_peft_nor_transformers(tmp_path):
    path, _ = stored(tmp_path / "a")
    program = (
        "import sys; from lora_one.adapters.command import main; status = main(sys.argv[1:]); "
        "assert not {'peft', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "inspect", path]
    assert "q_proj" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_is_no_stored_lora_is_refused_in_one_message(tmp_path, capsys):
    path, _ = stored(tmp_path / "a")
    weights = path / "adapter_model.safetensors"
    whole, config = weights.read_bytes(), settings(path)
    tensors = load(whole)  # not the file's own memory, which is about to be overwritten
    first = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"

    def inspect(message, *more):
        refused(capsys, message, "inspect", path, *more)

    refused(capsys, "there is no such folder", "inspect", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused(capsys, "is no PEFT adapter (nothing)", "inspect", tmp_path / "empty")
    inspect("is found in no layer's name. Did you mean 'q_proj'?", "--layers", "q_prj")
    inspect("is no regular expression", "--layers", "(")

    for changes, message in (
        ({"peft_type": "IA3"}, "holds a IA3 adapter; expected LORA"),
        ({"r": "4"}, "r must be a finite number, got '4'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, got 1000"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a text, got 5"),
        ({"target_modules": 5}, "target_modules must be a text or a list, got 5"),
        ({"rank_pattern": [1]}, "rank_pattern must map layers to numbers"),
        ({"rank_pattern": {"x": "2"}}, "'x' in rank_pattern must be a finite number, got '2'"),
        ({"alpha_pattern": {"x": None}}, "'x' in alpha_pattern must be a finite number, got None"),
        ({"r": 3}, "expected B (out, 3) and A (3, in) for its rank 3"),
        ({"rank_pattern": {"(": 1}}, "'(' in the adapter's rank_pattern or alpha_pattern is no"),
        ({"kasa_config": {"beta": 1}}, "kasa_config makes a layer add something else than s B A x"),
    ):
        change_settings(path, **changes)
        inspect(message)
        (path / "adapter_config.json").write_text(json.dumps(config))
    for text in ("{", "[]", "{}", "[" * 10**5):
        (path / "adapter_config.json").write_text(text)
        inspect("cannot be read as an adapter's settings")
    (path / "adapter_config.json").write_text(json.dumps(config))
    for origin in ("{", "[1]", "{}"):
        save_file(tensors, weights, {"lora_one": origin})
        inspect("says under 'lora_one' cannot be read")

    weights.write_bytes(whole[: len(whole) // 2])
    inspect("is damaged")
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, weights)
    inspect("layer 'model.layers.0.mlp.down_proj' has lora_A only")
    save_file({"x": torch.ones(1)}, weights)
    inspect("holds no lora_A and lora_B")
    save_file({**tensors, first: tensors[first] * float("nan")}, weights)
    inspect("holds values that are infinite or not a number")
    weights.rename(path / "adapter_model.bin")
    inspect("adapter_model.bin is a pickle, which can run code and is not opened here")
    (path / "adapter_model.bin").unlink()
    inspect("there is no adapter_model.safetensors.")


def test_adalora_is_refused(tmp_path, capsys):
    config = AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj"])
    path, _ = stored(tmp_path / "a", get_peft_model(tiny_llama(), config))
    refused(capsys, "holds a ADALORA adapter", "inspect", path)


def test_patterns_are_read_as_peft_reads_them():
    pattern = {"q_proj": 1, "layers.1.*": 2, "^model.layers.0.v_proj": 3, "mlp.(up|down)": 4}
    for name in (
        "model.layers.0.q_proj",
        "model.layers.1.v_proj",
        "model.layers.0.v_proj",
        "model.layers.10.v_proj",
        "model.layers.0.mlp.up",
        "model.layers.0.mlp.up_proj",
        "x.model.layers.0.v_proj",
        "lm_head",
        "q_proj",
        "not_q_proj",
    ):
        expected = pattern.get(get_pattern_key(pattern.keys(), name), 9)
        assert pattern_value(pattern, name, 9) == expected


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        ALL_KINDS,
        {"use_dora": True, "rank_pattern": {"v_proj": 2}},
        {"targets": ["down_proj"], "lora_bias": True, "alpha_pattern": {"layers.1.*": 3}},
        {"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 1}},
    ],
    ids=["kinds", "dora", "bias", "saved"],
)
def test_other_forms_give_the_same_model(use_rslora, options, tmp_path, llama_batches):
    path, peft_model = stored(tmp_path / "a", use_rslora=use_rslora, **options)
    expected = logits(peft_model, llama_batches[0])
    for forms in (["--uniform"], ["--fold-rslora"], ["--uniform", "--fold-rslora", "--rank", "6"]):
        assert main(["export", str(path), str(tmp_path / "b"), *forms]) == 0
        loaded = PeftModel.from_pretrained(tiny_llama(mlp_bias=True), tmp_path / "b")
        # Logits are of order 1 to 10 in fp32, and B is rescaled and rounded once.
        torch.testing.assert_close(logits(loaded, llama_batches[0]), expected, rtol=0, atol=3e-5)
        config = settings(tmp_path / "b")
        if "--uniform" in forms:
            assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert config["use_rslora"] is (use_rslora and "--fold-rslora" not in forms)


def test_folding_rslora_touches_no_factor(tmp_path):
    path, _ = stored(tmp_path / "a", use_rslora=True, rank_pattern={"v_proj": 2})
    assert main(["export", str(path), str(tmp_path / "b"), "--fold-rslora"]) == 0
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (path, tmp_path / "b")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert settings(tmp_path / "b")["lora_alpha"] == 16  # 8 sqrt(4)
    assert isinstance(settings(tmp_path / "b")["lora_alpha"], int)


def test_patterns_fit_no_layer_whose_name_ends_like_anothers(tmp_path):
    config = LoraConfig(
        r=4, use_rslora=True, target_modules=["proj", "other"], rank_pattern={"^proj": 2}
    )
    path, peft_model = stored(tmp_path / "a", get_peft_model(Endings(), config))
    assert main(["export", str(path), str(tmp_path / "b"), "--fold-rslora"]) == 0
    loaded = PeftModel.from_pretrained(Endings(), tmp_path / "b")
    x = torch.randn(3, 16)
    torch.testing.assert_close(loaded(x), peft_model(x))


def test_a_layers_key_fits_its_name_alone():
    names = ["proj", "sub.proj", "sub.other", "a.b", "x.a_b", "a+b"]
    keys = {name: pattern_key(name, names) for name in names}
    assert keys["sub.proj"] == "sub.proj"
    for name, key in keys.items():
        assert [other for other in names if pattern_value({key: 1}, other, 0)] == [name]


def test_an_alpha_of_zero_is_kept_or_refused(tmp_path, capsys):
    path, _ = stored(tmp_path / "a", alpha=0)
    for forms in (["--uniform"], ["--fold-rslora"], ["--rank", "2"]):
        assert main(["export", str(path), str(tmp_path / "b"), *forms]) == 0
        assert not any(
            x.any()
            for x in products(PeftModel.from_pretrained(tiny_llama(), tmp_path / "b")).values()
        )
    mixed, _ = stored(tmp_path / "c", alpha=0, alpha_pattern={"q_proj": 4})
    capsys.readouterr()
    refused(capsys, "lora_alpha is 0, but", "export", mixed, tmp_path / "d", "--rank", "2")


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_truncation_is_the_best_of_its_rank_and_says_what_it_lost(rank, tmp_path, capsys):
    path, peft_model = stored(tmp_path / "a", use_rslora=True, **ALL_KINDS)
    capsys.readouterr()
    assert main(["export", str(path), str(tmp_path / "b"), "--rank", str(rank)]) == 0
    said = capsys.readouterr().out
    loaded = PeftModel.from_pretrained(tiny_llama(mlp_bias=True), tmp_path / "b")
    tails, totals = 0.0, 0.0
    for name, dense in products(peft_model).items():
        S = torch.linalg.svdvals(dense)
        tail = float(S[rank:].square().sum())
        error = float((products(loaded)[name] - dense).norm())
        assert error == pytest.approx(tail**0.5, rel=1e-3, abs=1e-5)
        tails, totals = tails + tail, totals + float(S.square().sum())
    stated = float(said.split("relative error ")[1].split()[0])
    assert stated == pytest.approx((tails / totals) ** 0.5, rel=1e-3, abs=1e-5)
    assert settings(tmp_path / "b")["r"] == rank


def test_an_adapter_is_written_through_a_link(tmp_path):
    path, _ = stored(tmp_path / "a")
    replaced, _ = stored(tmp_path / "b")
    link = tmp_path / "newest"
    link.symlink_to("b")
    assert main(["export", str(path), str(link), "--rank", "2"]) == 0
    assert settings(replaced)["r"] == 2
    assert link.is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "newest"]


@pytest.mark.parametrize("form", [["--rank", "2"], ["--uniform"], ["--fold-rslora"]])
def test_an_export_never_replaces_the_adapter_that_it_reads(form, tmp_path, capsys):
    outer, _ = stored(tmp_path / "a")
    inner, _ = stored(outer / "other")  # as PEFT saves a second adapter
    (tmp_path / "link").symlink_to("a")
    before = {file: file.read_bytes() for file in tmp_path.rglob("adapter_*")}
    for source, out in ((outer, outer), (outer, tmp_path / "link"), (inner, outer)):
        refused(capsys, "is or holds the adapter that is read", "export", source, out, *form)
    assert {file: file.read_bytes() for file in tmp_path.rglob("adapter_*")} == before


def test_the_card_and_the_origin_come_along(tmp_path, llama_batches):
    peft_model = adapted(tiny_llama())
    lora_one.initialize(peft_model, llama_batches, method="lora_one")
    lora_one.export_adapter(peft_model, tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("# Mine\n")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b"), "--rank", "2"]) == 0
    card = (tmp_path / "b" / "README.md").read_text()
    assert card.startswith("# Mine\n\nChanged by `python -m lora_one.adapters export`: cut to rank")
    assert read_stored(tmp_path / "b").origin["method"] == "lora_one"
    with safe_open(tmp_path / "b" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_bad_exports_are_refused_and_nothing_is_written(tmp_path, capsys):
    path, _ = stored(tmp_path / "a")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "x.txt").write_text("mine")
    refused(capsys, "nothing to do", "export", path, tmp_path / "b")
    refused(capsys, "at least 1, got 0", "export", path, tmp_path / "b", "--rank", 0)
    refused(capsys, "holds no adapter", "export", path, mine, "--rank", 1)
    change_settings(path, init_lora_weights="pissa_niter_4")
    for form in (["--rank", "1"], ["--uniform"], ["--fold-rslora"]):
        refused(capsys, "init_lora_weights='pissa_niter_4'", "export", path, tmp_path / "b", *form)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "mine"]


@pytest.mark.parametrize(
    ("options", "changes", "vllm", "llama_cpp"),
    [
        ({}, {}, None, None),
        ({"use_rslora": True}, {}, None, "OUT --fold-rslora"),
        ({"rank_pattern": {"v_proj": 2}}, {}, "--uniform", None),
        ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4}}, {}, None, "--uniform"),
        ({"alpha_pattern": {"v_proj": 2}}, {}, "--uniform", "--uniform"),
        ({"use_dora": True}, {}, "DoRA", "DoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save (lm_head)", "modules_to_save"),
        ({"targets": ["down_proj"], "lora_bias": True}, {}, "biases", "biases"),
        ({}, {"bias": "all"}, "biases", "biases"),
        ({}, {"init_lora_weights": "olora"}, "changes when it loads", "changes when it loads"),
        ({}, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens", None),
        ({}, {"task_type": "SEQ_2_SEQ_LM"}, "decoder-only language models", None),
        ({"trainable_token_indices": [1]}, {}, "is no lora_A or lora_B", "is no lora_A or lora_B"),
    ],
)
def test_check_says_what_is_in_the_way(options, changes, vllm, llama_cpp, tmp_path, capsys):
    path, _ = stored(tmp_path / "a", **options)
    change_settings(path, **changes)
    for program, obstacle in (("vllm", vllm), ("llama.cpp", llama_cpp)):
        status = main(["check", str(path), "--for", program])
        out = capsys.readouterr().out
        assert status == (0 if obstacle is None else 1)
        assert (obstacle or "yes") in out
        assert ("- " in out) is (obstacle is not None)
    assert main(["check", str(path)]) == (0 if vllm is llama_cpp is None else 1)


def test_the_remedies_that_check_names_are_remedies(tmp_path, capsys):
    path, _ = stored(tmp_path / "a", use_rslora=True, rank_pattern={"v_proj": 2})
    assert main(["check", str(path)]) == 1
    assert "--uniform --fold-rslora" in capsys.readouterr().out
    assert main(["export", str(path), str(tmp_path / "b"), "--uniform", "--fold-rslora"]) == 0
    assert main(["check", str(tmp_path / "b")]) == 0
    assert "--max-lora-rank 8" in capsys.readouterr().out


def test_a_rank_that_vllm_has_no_place_for(tmp_path, capsys):
    path, _ = stored(tmp_path / "a", adapted(nn.Sequential(nn.Linear(600, 600)), 520, targets="0"))
    assert main(["check", str(path), "--for", "vllm"]) == 1
    assert "rank 520 is more than 512; cut it" in capsys.readouterr().out
    assert main(["export", str(path), str(tmp_path / "b"), "--rank", "512"]) == 0
    assert main(["check", str(tmp_path / "b"), "--for", "vllm"]) == 0
    assert "--max-lora-rank 512" in capsys.readouterr().out


def test_the_commands_that_check_prints_can_be_pasted_into_a_shell(tmp_path, capsys):
    path, _ = stored(tmp_path / "it's mine")
    change_settings(path, base_model_name_or_path="my base; rm")
    assert main(["check", str(path)]) == 0
    vllm, llama_cpp = (shlex.split(line) for line in capsys.readouterr().out.splitlines()[1::2])
    assert vllm[2] == "my base; rm"
    assert vllm[-1] == f"NAME={path}"
    assert llama_cpp[2] == str(path)
