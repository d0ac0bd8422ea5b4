"""The whole report: its numbers recomputed, its files readable, its page harmless."""

import base64
import csv
import gzip
import json
import math
import re
import shutil
import statistics
import subprocess
import sys

import pytest
from PIL import Image

from lora_one.reports import details
from lora_one.reports.build import build_report
from lora_one.reports.latex import escape, to_latex
from lora_one.reports.page import embed, pack
from lora_one.reports.records import find_runs
from lora_one.reports.table import Results

SCORES = {"lora": [0.50, 0.52, 0.57], "lora_one": [0.61, 0.60, 0.65], "pissa": [0.60, 0.61, 0.67]}
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u2028&|_$%"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_run):
    """Three methods, two rates, three seeds, one of each kind of trouble, hostile text."""
    root = tmp_path_factory.mktemp("runs")
    for method, scores in SCORES.items():
        for seed, score in enumerate(scores):
            log = [{"step": 0, "epoch": 0.0, "validation_loss": 3.0}]
            for step in range(1, 41):
                loss = 3 * math.exp(-step / 10) + 0.1
                log.append({"step": step, "loss": loss, "epoch": step / 40})
            log.append({"step": 40, "epoch": 1.0, "validation_loss": 0.4})
            log.append({"step": 20, "principal_angle_B/layer.0": 40.0 + seed})
            log.append({"step": 40, "principal_angle_B/layer.0": 30.0 + seed})
            spectra = {20: [0.3, 0.2, 0.1], 40: [0.4, 0.2, 0.1, 0.0]}
            for step, values in spectra.items():
                norm = math.hypot(*values)
                update = {"update_norm/layer.0": norm, "update_singular_values/layer.0": values}
                log.append({"step": step, "principal_angle_A/layer.0": None, **update})
            layer = {
                "name": "layer.0",
                "shape": [8, 8],
                "rank": 2,
                "singular_values": [2.0, 1.0],
                "next_singular_value": 0.5,
                "captured_energy": 0.9,
                "norm_ratio": 0.01,
            }
            predictions = [
                {
                    "row_id": "test/0",
                    "prompt": "Q: 1 + 1?",
                    "reply": HOSTILE,
                    "reference": "2",
                    "scores": {"strict": {"parsed": None, "correct": False}},
                    "stop_reason": "length",
                }
            ]
            huge = {"name": "layer.1", "singular_values": [10**400, 1]}  # no float is as large
            init = {"method": method, "equation": HOSTILE, "layers": [layer, huge]}
            for rate, penalty in ((1e-3, 0.0), (2e-3, 0.1)):
                write_run(
                    root,
                    f"{method}-{rate:g}-{seed}",
                    method=method,
                    rate=rate,
                    seed=seed,
                    score=score - penalty,
                    loss=0.4 + penalty,
                    seconds=30.0 + 10 * penalty,
                    log=log,
                    init=init,
                    predictions=predictions,
                )
    error = {"type": "RuntimeError", "message": HOSTILE, "traceback": HOSTILE, "phase": "train"}
    write_run(root, "failed", seed=8, score=1.0, status="failed", record={"error": error})
    write_run(root, "running", seed=9, score=1.0, status="running")
    write_run(root, "torn", seed=7, score=1.0)
    (root / "torn" / "run.json").write_text('{"status": "finished", "metrics": {"accuracy": 1.0')
    return root


@pytest.fixture(scope="module")
def report(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return build_report(find_runs(folder), out, title="A & B <i>", paper="lora_one/table2")


def read_csv(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_means_and_deviations_are_those_of_the_folders(report):
    rows = read_csv(report.folder / "groups.csv")
    found = {row["method"]: row for row in rows if row["lr"] == "0.001"}
    for method, scores in SCORES.items():
        assert float(found[method]["mean"]) == pytest.approx(statistics.mean(scores))
        assert float(found[method]["sd"]) == pytest.approx(statistics.stdev(scores))
        assert found[method]["n"] == "3"
    assert len(rows) == 6


def test_the_comparison_is_that_of_the_chosen_rate(report):
    rows = {row["method, optimiser"]: row for row in read_csv(report.folder / "comparison.csv")}
    assert rows["lora · adamw"]["chosen"] == "lr 0.001"
    assert rows["lora · adamw"]["settings tried"] == "2"
    assert rows["pissa · adamw"]["verdict"] == "best"
    assert rows["lora · adamw"]["difference"] == f"{(1.59 - 1.88) / 3:+.4f}"
    # Per seed: LoRA -0.10, -0.09, -0.10; LoRA-One 0.01, -0.01, -0.02.
    assert rows["lora · adamw"]["verdict"] == "worse"
    assert rows["lora_one · adamw"]["verdict"] == "cannot be told from noise"
    # Six runs: 2 s of start each, three trainings of 30 s and three of 31 s.
    assert float(rows["lora · adamw"]["all trials s"]) == 6 * 2 + 3 * 30 + 3 * 31


def test_every_folder_is_listed_and_the_unfinished_are_in_no_average(report):
    rows = {row["run"]: row for row in read_csv(report.folder / "runs.csv")}
    assert len(rows) == 21
    for name, status in (("failed", "failed"), ("running", "running"), ("torn", "malformed")):
        assert rows[name]["status"] == status
        assert rows[name]["accuracy"] == ""
    text = (report.folder / "report.md").read_text()
    assert "not in the table: malformed: torn" in text
    assert "1.0000" not in text


def test_the_best_is_bold_and_a_tie_is_marked(report):
    text = (report.folder / "comparison.md").read_text()
    assert f"**{1.88 / 3:.4f} ± {statistics.stdev(SCORES['pissa']):.4f}**" in text
    assert "| ≈ 0.6200 ±" in text
    assert "| 0.5300 ±" in text


def test_markdown_shows_html_and_does_not_obey_it(report):
    text = (report.folder / "report.md").read_text()
    assert "<script" not in text
    assert "&lt;/script>" in text


def test_every_plot_is_a_png_and_an_svg(report):
    names = {file.stem for file in report.files if file.suffix == ".png"}
    assert names == {
        "training-loss",
        "validation-loss",
        "learning-rate",
        "learning-rate-loss",
        "differences",
        "time",
        "spectra",
        "angles-b",
        "update-norm",
        "update-spectrum",
    }
    for name in names:
        with Image.open(report.folder / f"{name}.png") as image:
            assert image.size[0] > 900
            # A plot has ink: more than one colour, and not mostly ink.
            colours = image.convert("L").histogram()
            assert 0.5 < sum(colours[250:]) / sum(colours) < 0.99
        svg = (report.folder / f"{name}.svg").read_text()
        assert "<svg" in svg
        assert "http" not in re.sub(
            r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<rdf:.*?>', "", svg[:300]
        )


def test_the_same_folders_give_the_same_files(folder, report, tmp_path):
    again = build_report(find_runs(folder), tmp_path, title="A & B <i>", paper="lora_one/table2")
    for first, second in zip(report.files, again.files, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_the_page_is_one_file_that_asks_for_nothing(report):
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!#|data:,)', page)
    assert "@import" not in page
    assert "url(" not in page


def test_no_text_of_a_run_is_markup_in_the_page(report):
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    assert "owned" in json.dumps(_data(page))
    assert "<img" not in page
    # Only our own script elements: the data, the program, one block per run.
    assert page.count("<script") == 2 + 21
    assert page.count("</script>") == 2 + 21


def _data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_holds_each_run_once(report):
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    data = _data(page)
    index = [row[0] for row in data["runs"]["rows"]].index("lora_one-0.001-1")
    packed = re.search(rf'id="run-{index}">([^<]*)<', page)[1]
    run = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert run["metrics"]["accuracy"] == 0.60
    assert run["settings"]["init.direction"] == "LoRA-One"
    assert "peft.lora_r" not in run["settings"]
    assert data["common"]["peft.lora_r"] == 8
    assert run["replies"]["rows"][0]["reply"] == HOSTILE
    assert run["loss"]["points"] == len(run["loss"]["x"]) == 40
    assert run["spectra"] == {"layer.0": [0.4, 0.2, 0.1, 0.0]}
    assert run["norms"]["layer.0"]["y"] == [0.37417, 0.45826]
    (drawn,) = [f for f in data["blocks"][0]["figures"] if f["key"] == "update-spectrum"]
    lora_one = next(one for one in drawn["series"] if one["hue"] == "lora_one")
    assert (lora_one["x"], lora_one["y"]) == ([1, 2, 3], [1, 0.5, 0.25])  # a log axis has no 0


def test_a_page_that_would_become_too_large_shows_less(folder, report, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_one.reports.build.PAGE_BYTES", 2_000)
    monkeypatch.setattr("lora_one.reports.build.write_plots", lambda *_: [])
    small = build_report(find_runs(folder), tmp_path)
    assert small.page_bytes < report.page_bytes
    text = (tmp_path / "report.html").read_text()
    assert f"at most {details.LEVELS[-1].buckets} points per curve" in text


def test_data_is_safe_inside_a_script_element():
    text = embed({"a": HOSTILE, "b": float("nan"), "c": [float("inf")]})
    assert "<" not in text
    assert json.loads(text) == {"a": HOSTILE, "b": "nan", "c": ["inf"]}


def test_packed_details_are_letters_only():
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", pack({"a": HOSTILE, "lone": "\ud800"}))


def test_latex_prints_what_it_was_given():
    table = Results(
        ["method", "optimiser", "accuracy_%"],
        [["lora_one", "adamw", "0.5 ± 0.1"], [HOSTILE, "a&b", "{~^\\}#"]],
        [],
        {(0, 2): "best", (1, 2): "tie"},
    )
    text = to_latex(table, caption="100 % of it", label="tab:x")
    assert r"lora\_one & adamw & \textbf{0.5 $\pm$ 0.1} \\" in text
    assert r"$\approx$ \{\textasciitilde{}\textasciicircum{}\textbackslash{}\}\#" in text
    assert escape("é\u2028") == "??"


ENGINES = ("pdflatex", "tectonic", "xelatex", "lualatex")


@pytest.mark.skipif(not any(map(shutil.which, ENGINES)), reason="there is no TeX engine here")
def test_latex_compiles(report, tmp_path):
    tables = "\n".join(file.read_text() for file in report.files if file.suffix == ".tex")
    (tmp_path / "all.tex").write_text(
        "\\documentclass[landscape]{article}\\usepackage{booktabs}\\begin{document}\n"
        f"{tables}\n\\end{{document}}\n"
    )
    engine = next(filter(shutil.which, ENGINES))
    options = [] if engine == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run(
        [engine, *options, "all.tex"], cwd=tmp_path, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "all.pdf").exists()


def test_without_a_finished_run_there_is_still_a_report(tmp_path, write_run):
    write_run(tmp_path, "a", status="failed")
    report = build_report(find_runs(tmp_path), tmp_path / "report")
    assert (report.folder / "report.html").exists()
    assert "failed: a" in (report.folder / "report.md").read_text()


def command(*arguments):
    line = [sys.executable, "-m", "lora_one.reports", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command_writes_the_report_where_it_is_told(tmp_path, write_run):
    write_run(tmp_path / "runs", "a")
    answer = command(tmp_path / "runs", "--out", tmp_path / "here", "--paper", "lora_one/table3")
    assert answer.returncode == 0, answer.stderr
    assert "report.html" in answer.stdout
    assert {"report.html", "report.md", "paper.tex", "runs.csv"} <= {
        file.name for file in (tmp_path / "here").iterdir()
    }


@pytest.mark.parametrize("case", ["no such table", "out is a file"])
def test_the_command_refuses_with_one_message(tmp_path, write_run, case):
    write_run(tmp_path / "runs", "a")
    (tmp_path / "file").write_text("")
    options = {
        "no such table": ["--paper", "lora_one/tabel2"],
        "out is a file": ["--out", tmp_path / "file"],
    }[case]
    answer = command(tmp_path / "runs", *options)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ")
    assert len(answer.stderr.splitlines()) == 1


def test_reports_need_no_torch():
    script = (
        "import sys, lora_one.reports.build, lora_one.reports.command, lora_one.reports.plots; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_two_benchmarks_are_two_blocks_with_files_of_their_own(tmp_path, write_run):
    for dataset in ("gsm8k", "mmlu"):
        for method, score in (("lora", 0.5), ("pissa", 0.6)):
            write_run(
                tmp_path,
                f"{dataset}-{method}",
                method=method,
                score=score,
                memory=10**9 + len(method),
                settings={"dataset.name": dataset},
            )
    report = build_report(find_runs(tmp_path), tmp_path / "report")
    names = {file.name for file in report.files if file.suffix == ".svg"}
    assert names == {f"{dataset}-tiny-llama-accuracy-memory.svg" for dataset in ("gsm8k", "mmlu")}
    rows = read_csv(tmp_path / "report" / "comparison.csv")
    assert [row["verdict"] for row in rows] == [
        "best",
        "not judged: one seed in common, no spread",
    ] * 2


def test_an_untrained_start_stands_beside_trained_runs(tmp_path, write_run):
    write_run(tmp_path, "a", method="lora_one", score=0.6)
    write_run(tmp_path, "b", method="lora_one", score=0.2, settings={"train": "none"})
    report = build_report(find_runs(tmp_path), tmp_path / "report")
    names = [row["method, optimiser"] for row in read_csv(report.folder / "comparison.csv")]
    assert names == ["lora_one · adamw", "lora_one · none"]
