"""The wheel and the source distribution: their contents, and that they work alone."""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .test_dependencies import PROJECT, closure, parsed

pytest.importorskip("hatchling", reason="hatchling builds the distributions, and is not installed")

ROOT = Path(__file__).parents[2]
# Named because the library's promise names them; the test blocks whatever PEFT does not need.
NEVER = {"hydra", "omegaconf", "wandb", "datasets", "pydantic", "matplotlib"}


def build(folder, out):
    """Build both distributions of a source folder with the backend alone: no network, no pip."""
    line = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(line, cwd=folder, check=True, capture_output=True)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The source distribution's only folder."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(built[1]) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder that holds the wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*line, "--no-compile", "--target", str(target), str(built[0])], check=True)
    return target


def tracked():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone: which files belong to the project is not known")
    line = ["git", "ls-files", "-z"]
    names = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in names.split("\0") if name and (ROOT / name).exists()}


def test_the_source_distribution_has_every_file_of_the_repository(unpacked):
    names = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    assert tracked() <= names
    assert not {name.split("/")[0] for name in names} & {
        ".venv",
        ".git",
        "results",
        "build",
        "dist",
    }


def test_the_wheel_has_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package >= {name for name in tracked() if name.startswith("lora_one/")}
    assert all(name.startswith("lora_one/") for name in package)
    for data in ("py.typed", "reports/published.yaml", "reports/assets/main.js"):
        assert f"lora_one/{data}" in package
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_builds_the_same_wheel(built, unpacked, tmp_path):
    again, _ = build(unpacked, tmp_path)
    with zipfile.ZipFile(built[0]) as first, zipfile.ZipFile(again) as second:
        assert {i.filename: i.CRC for i in first.infolist()} == {
            i.filename: i.CRC for i in second.infolist()
        }


def test_the_metadata_says_what_pyproject_says(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert "Author-email" not in metadata
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {r.name for r in needed if r.marker is None} == {"torch", "peft", "transformers"}
    assert {"harness", "reports", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata.get_all("Project-URL")
    assert "# LoRA-One Lab" in metadata.get_payload()


def not_installed_with(lines):
    """Import packages that exist here and would not after installing these requirements only."""
    kept = closure(lines)
    return sorted(
        package
        for package, owners in packages_distributions().items()
        if package.isidentifier() and not {canonicalize_name(owner) for owner in owners} & kept
    )


# sys.modules[name] = None makes an import fail as that of a missing package, find_spec included.
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
"""

CORE = """
from importlib import import_module
from pkgutil import walk_packages
import lora_one
for module in {modules!r}:
    found = import_module(f"lora_one.{{module}}")
    for inner in walk_packages(getattr(found, "__path__", []), f"{{found.__name__}}."):
        import_module(inner.name)
assert lora_one.__file__.startswith({site!r}), lora_one.__file__

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
ids = torch.arange(24).reshape(3, 8)
report = lora_one.initialize(model, [{{"input_ids": ids, "labels": ids}}], method="lora_one")
optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=1e-3)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
lora_one.export_adapter(model, "adapter")
print(len(report.layers), report.loss_before != report.loss_after)
"""


def run(code, site, blocked, folder):
    """Run code where only the wheel and what is not blocked can be imported."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(blocked=blocked) + code],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_the_library_works_with_torch_and_peft_only(installed, tmp_path):
    blocked = sorted({*not_installed_with(PROJECT["dependencies"]), *NEVER})
    modules = ["adapters", "errors", "gradients", "layers", "numerics", "optimizers"]
    modules += ["preconditioning", "sharding"]
    said = run(CORE.format(modules=modules, site=str(installed)), installed, blocked, tmp_path)
    assert said.split() == ["7", "True"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


RUN = {
    "run_id": "run",
    "status": "finished",
    "method": "lora_one",
    "seed": 0,
    "primary_metric": "accuracy",
    "metrics": {"accuracy": 0.5, "n": 100},
    "losses": {"validation": 1.0},
}


def test_reports_are_written_with_their_extra_only(installed, tmp_path):
    folder = tmp_path / "results" / "run"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "config.yaml").write_text("{seed: 0, train: full, optimizer: {name: adamw}}")
    lines = [str(r) for r in parsed([*PROJECT["dependencies"], "lora-one[reports]"]).values()]
    blocked = not_installed_with(lines)
    assert {"hydra", "omegaconf", "wandb", "datasets", "sklearn", "submitit"} <= set(blocked)
    code = "from lora_one.reports.__main__ import main; sys.exit(main(['results']))"
    assert "report.html" in run(code, installed, blocked, tmp_path)
    assert "lora_one" in (tmp_path / "results" / "report" / "report.html").read_text()
