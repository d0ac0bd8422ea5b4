"""Folders that are not what they should be are named, not crashed on and not counted."""

import pytest
from omegaconf import OmegaConf

from lora_one.reports.records import find_runs
from lora_one.reports.table import summarise

SPOILT = {
    "torn record": ("run.json", '{"status": "finis', "run.json cannot be read"),
    "empty record": ("run.json", "", "run.json cannot be read"),
    "list for a record": ("run.json", "[1, 2]", "run.json holds a list"),
    "binary record": ("run.json", b"\xff\xfe\x00", "run.json cannot be read"),
    "torn config": ("config.yaml", "model: {learning_rate: ", "while parsing"),
    "list for a config": ("config.yaml", "- 1\n", "config.yaml holds a list"),
    "tagged config": (
        "config.yaml",
        "a: !!python/object/apply:os.getcwd []\n",
        "could not determine",
    ),
}
UNBELIEVABLE = {
    "no metrics": ({"metrics": None}, "metrics"),
    "score is text": ({"metrics": {"accuracy": "0.9", "n": 1}}, "accuracy is '0.9'"),
    "score is true": ({"metrics": {"accuracy": True, "n": 1}}, "accuracy is True"),
    "no phases": ({"phases": {}}, "phases"),
    "more bytes than a float holds": (
        {"phases": {"load": {"seconds": 1.0, "peak_memory_bytes": 10**400}}},
        "phases.load.peak_memory_bytes",
    ),
    "more seconds than a float holds": ({"init": {"seconds": 10**400}}, "init.seconds"),
    "no losses": ({"losses": {}}, "losses.validation"),
    "no method": ({"method": 3}, "method"),
    "unknown status": ({"status": "done"}, "status 'done'"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_file_makes_a_malformed_run(tmp_path, write_run, how):
    name, content, words = SPOILT[how]
    write_run(tmp_path, "good", score=0.5)
    file = write_run(tmp_path, "spoilt", seed=1, score=1.0) / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    good, spoilt = find_runs(tmp_path)
    assert (good.status, spoilt.status) == ("finished", "malformed")
    assert words in spoilt.problem
    results = summarise([good, spoilt])
    assert [row[3] for row in results.rows] == ["1"]
    assert any(note.startswith("malformed: spoilt (") for note in results.notes)


@pytest.mark.parametrize("how", UNBELIEVABLE)
def test_a_finished_record_that_lacks_something_is_not_counted(tmp_path, write_run, how):
    record, words = UNBELIEVABLE[how]
    write_run(tmp_path, "a", record=record)
    (run,) = find_runs(tmp_path)
    assert run.status == "malformed"
    assert words in run.problem
    assert summarise([run]).rows == []


@pytest.mark.parametrize("samples", ["many", 0, [2]])
def test_a_number_of_replies_that_is_none_is_not_divided_by(tmp_path, write_run, samples):
    write_run(tmp_path, "a", settings={"evaluation.samples": samples})
    (run,) = find_runs(tmp_path)
    assert "evaluation.samples" in run.problem
    assert summarise([run]).rows == []


def test_a_score_that_is_not_a_number_is_not_counted(tmp_path, write_run):
    folder = write_run(tmp_path, "a", score=0.25)
    text = (folder / "run.json").read_text().replace("0.25", "NaN")
    (folder / "run.json").write_text(text)
    (run,) = find_runs(tmp_path)
    assert run.status == "malformed"


def test_a_run_without_a_record_yet_is_missing(tmp_path, write_run):
    (write_run(tmp_path, "a") / "run.json").unlink()
    assert [run.status for run in find_runs(tmp_path)] == ["missing"]


@pytest.mark.parametrize("status", ["running", "failed", "preempted"])
def test_only_finished_runs_are_averaged(tmp_path, write_run, status):
    write_run(tmp_path, "a", seed=0, score=0.4)
    write_run(tmp_path, "b", seed=1, score=1.0, status=status)
    results = summarise(find_runs(tmp_path))
    assert results.rows[0][4] == "0.4000"
    assert results.notes == [f"{status}: b"]


def test_a_preempted_run_says_who_stopped_it(tmp_path, write_run):
    facts = {"preempted": {"reason": "SIGUSR1, 60 s before the limit", "phase": "train"}}
    write_run(tmp_path, "a", status="preempted", record=facts)
    assert summarise(find_runs(tmp_path)).notes == ["preempted: a (SIGUSR1, 60 s before the limit)"]


def test_folders_that_are_no_runs_are_left_alone(tmp_path, write_run):
    write_run(tmp_path, "a")
    (tmp_path / "cache" / "init").mkdir(parents=True)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("")
    (tmp_path / "notes.txt").write_text("run.json")
    assert [run.folder.name for run in find_runs(tmp_path)] == ["a"]
    assert find_runs(tmp_path / "nowhere") == []


def test_settings_are_read_as_omegaconf_reads_them(tmp_path, write_run):
    folder = write_run(tmp_path, "a")
    text = "optimizer: {name: adamw}\nmodel: {learning_rate: 1e-3, other: -2E+4, word: 1e, n: 3}\n"
    (folder / "config.yaml").write_text(text)
    (run,) = find_runs(tmp_path)
    expected = OmegaConf.to_container(OmegaConf.create(text))["model"]
    assert {key: run.settings[f"model.{key}"] for key in expected} == expected


def test_dates_and_lists_in_a_configuration_do_no_harm(tmp_path, write_run):
    settings = {"dataset.revision": "2024-01-01", "optimizer.betas": [0.9, 0.999]}
    folder = write_run(tmp_path, "a", settings=settings)
    text = (folder / "config.yaml").read_text().replace("'2024-01-01'", "2024-01-01")
    (folder / "config.yaml").write_text(text)
    assert len(summarise(find_runs(tmp_path)).rows) == 1


def test_what_only_says_where_a_run_is_kept_is_no_setting(tmp_path, write_run):
    write_run(tmp_path, "a")
    assert "output_dir" not in find_runs(tmp_path)[0].settings
