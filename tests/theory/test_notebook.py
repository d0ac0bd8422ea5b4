"""``Toy_Experiments.ipynb`` is executed, small, free of algorithms, and runs without a network."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_one.theory.digits import fine_tune
from lora_one.theory.linear import GAMMAS, RATES
from lora_one.theory.sizes import FULL, SIZE_VARIABLE, SMALL, sizes

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "Toy_Experiments.ipynb"


def cells(path=NOTEBOOK):
    return json.loads(path.read_text())["cells"]


def code(path=NOTEBOOK):
    return [cell for cell in cells(path) if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def outputs(path, kind):
    return [o["data"][kind] for c in code(path) for o in c["outputs"] if kind in o.get("data", {})]


def test_no_cell_is_longer_than_25_lines():
    assert max(len(source(cell).splitlines()) for cell in code()) <= 25


def test_the_notebook_contains_no_algorithm():
    for cell in code():
        tree = ast.parse(source(cell))
        for node in ast.walk(tree):
            assert not isinstance(
                node, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.While | ast.MatMult
            ), source(cell)
            if isinstance(node, ast.Import):
                assert {name.name for name in node.names} <= {"os", "torch"}
            if isinstance(node, ast.ImportFrom):
                assert node.module.startswith("lora_one.theory")


def test_it_is_committed_as_executed_from_top_to_bottom():
    assert [cell["execution_count"] for cell in code()] == list(range(1, len(code()) + 1))
    kinds = {output["output_type"] for cell in code() for output in cell["outputs"]}
    assert "error" not in kinds
    streams = [o for cell in code() for o in cell["outputs"] if o["output_type"] == "stream"]
    assert all(stream["name"] == "stdout" for stream in streams)
    assert len(outputs(NOTEBOOK, "image/png")) >= 12
    assert NOTEBOOK.stat().st_size < 2_000_000


def test_every_picture_has_its_statement_and_what_to_see():
    for before, cell in zip(cells(), cells()[1:], strict=False):
        if cell["cell_type"] == "code" and "figures." in source(cell):
            assert "**Statement.**" in source(before)
            assert "**What to see.**" in source(before)
            assert "parameters(" in source(cell)


def test_the_text_counts_what_the_methods_choose_from():
    text = "".join(source(cell) for cell in cells())
    rates = inspect.signature(fine_tune).parameters["rates"].default
    assert (len(RATES), len(GAMMAS), len(rates)) == (6, 6, 4)
    for words in ("(of six)", "the best of six sizes γ", "each method at its best rate of four"):
        assert words in text


def test_sizes_name_the_same_experiments(monkeypatch):
    assert SMALL.keys() == FULL.keys()
    monkeypatch.setenv(SIZE_VARIABLE, "small")
    assert sizes() is SMALL
    monkeypatch.setenv(SIZE_VARIABLE, "huge")
    with pytest.raises(ValueError, match="huge is not a size; use full or small"):
        sizes()


@pytest.mark.slow
def test_the_notebook_runs_offline(tmp_path):
    """Every cell, with smaller experiments, where nothing can be reached."""
    executed = tmp_path / "executed.ipynb"
    nowhere = "http://127.0.0.1:9"  # the discard port: a connection is refused at once
    environment = os.environ | {
        SIZE_VARIABLE: "small",
        "LORA_ONE_FIGURES": str(tmp_path / "figures"),
        "HF_HUB_OFFLINE": "1",
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "127.0.0.1,localhost",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", str(NOTEBOOK)]
    command += ["--output", str(executed), "--ExecutePreprocessor.timeout=150"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(outputs(executed, "image/png")) == len(outputs(NOTEBOOK, "image/png"))
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert len(drawn) == len(outputs(NOTEBOOK, "image/png"))
