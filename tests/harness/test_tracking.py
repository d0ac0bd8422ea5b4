"""The copy in W&B says what the run folder says, and an outage of W&B is no matter to the run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lora_one.errors import InputError
from lora_one.harness import stages
from lora_one.harness.records.record import RunRecord
from lora_one.harness.tracking.follow import NEWS
from lora_one.harness.tracking.mirror import read_settings, wandb_id
from lora_one.harness.tracking.tracker import NoTracker, start_tracking

from .wandb_files import read_run
from .wandb_server import serve

ROOT = Path(__file__).parents[2]
LINES = [
    {"step": 0, "base_validation_loss": 3.5},
    {"step": 0, "epoch": 0.0, "validation_loss": 3.25},
    {"step": 1, "principal_angle_B/q": None, "update_singular_values/q": [0.5, 0.25]},
    {"step": 1, "loss": 3.0, "grad_norm": 0.5},
    {"step": 2, "loss": 2.5, "grad_norm": 0.25},
    {"step": 2, "epoch": 1.0, "validation_loss": 2.75},
    {"step": 2, "accuracy": 0.5, "n": 6},
]
LAYER = {
    "name": "model.layers.0.mlp.up_proj",
    "shape": [48, 32],
    "rank": 2,
    "singular_values": [4.0, 2.0],
    "next_singular_value": 1.0,
    "svd_error": 0.0,
    "captured_energy": 0.9,
    "norm_ratio": 0.01,
}
REPORT = {
    "method": "lora_one",
    "loss_before": 3.5,
    "loss_after": 3.25,
    "layers": [LAYER, LAYER | {"name": "lm_head"}],
}
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def stranger(monkeypatch, tmp_path):
    """A user whom W&B does not know: no key, no settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.delenv("LORA_ONE_SWEEP", raising=False)


@pytest.fixture
def server(monkeypatch):
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


@pytest.fixture
def config(small):
    return lambda *overrides: small("tracking=wandb", "wandb.timeout_seconds=20", *overrides)


def attempt(config, lines=LINES, error=None) -> Path:
    """A run without the training: the record, the tracker and what stages tell them."""
    record = RunRecord(config)
    with (
        suppress(RuntimeError, KeyboardInterrupt),
        stages.tracking(config, record.open()) as tracker,
        record.closing(),
    ):
        tell(record, tracker, lines)
        if error:
            raise error
    return record.folder


def tell(record, tracker, lines) -> None:
    record.update(provenance={"git": {"commit": "abc"}})
    record.write_json("init.json", REPORT)
    for line in lines:
        record.log(**line)
        tracker.notice()
    record.update(metrics={"accuracy": 0.5, "n": 6}, losses={"validation": 2.75})


def plain(history) -> list[dict]:
    """History without what W&B adds: when, and the index of the line."""
    return [{key: row[key] for key in row if not key.startswith("_")} for row in history]


def services_of(pid: int) -> list[str]:
    """The W&B services that a process has started and that are alive."""
    found = subprocess.run(["pgrep", "-f", "--", f"wandb-core.*--pid {pid}"], capture_output=True)
    return found.stdout.decode().split()


def gone(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_without_a_key_the_copy_is_offline_and_complete(config, read, monkeypatch, capsys):
    monkeypatch.setenv("LORA_ONE_SWEEP", "c0ffee00")
    settings = config("wandb.tags=[a,b]", "wandb.log_plots=true")
    folder = attempt(settings)
    run = read_run(folder)
    assert plain(run.history[:-1]) == LINES[:-1]
    assert run.history[-1].items() >= LINES[-1].items()
    assert [row["_step"] for row in run.history] == list(range(len(LINES)))
    assert run.history[-1]["plots/losses_table.nrows"] == 4
    assert run.history[-1]["plots/spectra_table.nrows"] == 4
    assert run.history[-1]["plots/update_spectra_table.nrows"] == 2
    assert (run.id, run.name) == (wandb_id(folder.name), folder.name)
    assert (run.project, run.group, run.tags) == ("lora-one", "c0ffee00", ["a", "b"])
    assert run.config.items() >= settings.model_dump().items()
    assert (run.config["method"], run.config["run_id"]) == ("lora_one", folder.name)
    assert run.config["provenance"] == {"git": {"commit": "abc"}}
    assert run.summary.items() >= {"accuracy": 0.5, "n": 6, "status": "finished"}.items()
    assert run.summary["init"]["loss_after"] == 3.25
    assert (run.summary["init_layers"]["nrows"], run.exit) == (2, 0)
    assert [metric.name or metric.glob_name for metric in run.metrics] == ["step", "*"]
    assert run.metrics[1].step_metric == "step"
    assert read(folder, "run.json")["wandb"] == {"id": run.id, "group": "c0ffee00"}
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert re.match(r"wandb: offline, no API key for https://\S+; later: wandb sync ", line)
    assert line.endswith(f"{folder}/wandb/offline-run-*")
    assert printed.err == ""


@pytest.mark.parametrize(
    ("error", "status", "exit_code"),
    [(RuntimeError("no"), "failed", 1), (KeyboardInterrupt(), "preempted", 75)],
)
def test_the_end_reaches_the_copy(config, error, status, exit_code):
    run = read_run(attempt(config(), error=error))
    assert (run.summary["status"], run.exit) == (status, exit_code)
    assert run.summary["error"]["type"] == type(error).__name__
    assert plain(run.history) == LINES


def test_the_sync_script_makes_the_same_run_and_may_be_repeated(config):
    folder = attempt(config("wandb.group=g", "wandb.log_adapter=true"))
    live = read_run(folder)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for _ in range(2):
        done = sync(folder.parent, "--mode", "offline", "--project", "other")
        assert done.returncode == 0, done.stderr
        assert f"{folder.name}: finished, {len(LINES)} lines, run other/{live.id}\n" in done.stdout
        assert done.stderr == ""
        rebuilt = read_run(folder)
        assert plain(rebuilt.history) == plain(live.history) == LINES
        assert (rebuilt.id, rebuilt.group, rebuilt.project) == (live.id, "g", "other")
        assert rebuilt.exit == live.exit == 0
        assert [a.name for a in rebuilt.artifacts][-1] == f"adapter-{live.id}"
        for key in ("accuracy", "losses", "status", "init"):
            assert rebuilt.summary[key] == live.summary[key]
        for key in live.config.keys() - {"_wandb", "wandb"}:
            assert rebuilt.config[key] == live.config[key]


def test_a_broken_folder_does_not_stop_the_sync_of_the_others(config):
    broken, whole = sorted(attempt(config(f"seed={seed}")) for seed in (0, 1))
    with (broken / "metrics.jsonl").open("a") as file:
        file.write("{\n")
    done = sync(broken.parent, "--mode", "offline")
    assert done.returncode == 1
    assert (
        f"{broken.name}: failed: {broken}/metrics.jsonl, line {len(LINES) + 1}: not JSON"
        in done.stderr
    )
    assert "1 of 2 runs could not be copied" in done.stderr
    assert f"{whole.name}: finished, {len(LINES)} lines" in done.stdout
    run = read_run(whole)
    assert (run.id, plain(run.history)) == (wandb_id(whole.name), LINES)


def sync(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "wandb_sync.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_sync_script_says_what_is_wrong_with_its_input(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    for arguments, complaint in {
        (tmp_path / "nothing",): "is no run folder and has none in it",
        (tmp_path / "run",): "config.yaml cannot be read",
        (tmp_path, "--mode", "sideways"): "invalid choice: 'sideways'",
    }.items():
        done = sync(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr
    for settings, complaint in {
        "wandb: {": "config.yaml cannot be read",
        "wandb: 5": "is not the configuration of a run",
    }.items():
        (tmp_path / "run" / "config.yaml").write_text(settings)
        with pytest.raises(InputError, match=complaint):
            read_settings(tmp_path / "run")


def test_online_a_resumed_run_goes_on_under_its_id_without_repeating(config, server):
    folder = attempt(config("wandb.entity=team"), LINES[:4], KeyboardInterrupt())
    assert plain(server.history) == LINES[:4]
    assert server.upserts[0]["name"] == wandb_id(folder.name)
    assert (server.upserts[0]["project"], server.upserts[0]["entity"]) == ("lora-one", "team")
    # The next attempt starts from a checkpoint that is older than the last line.
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:2]))
    record = RunRecord(config("wandb.entity=team"))
    tracker = start_tracking(record.config, record)
    with record.closing():
        tell(record, tracker, LINES[2:])
    tracker.finish()
    assert plain(server.history) == LINES
    assert {upsert["name"] for upsert in server.upserts} == {wandb_id(folder.name)}
    assert server.exit_codes == [75, 0]


def test_online_a_run_that_starts_over_replaces_what_it_had_sent(config, server):
    attempt(config(), LINES[:4], RuntimeError("no"))
    again = [line | {"loss": 9.0} for line in LINES[:3]]
    attempt(config(), again)
    assert plain(server.history) == again
    assert server.exit_codes == [1, 0]


def test_sync_goes_online_where_it_can(config, server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = attempt(config())
    monkeypatch.delenv("WANDB_MODE")
    assert not server.upserts
    done = sync(folder)
    assert done.returncode == 0, done.stderr
    assert (plain(server.history), server.exit_codes) == (LINES, [0])
    server.health = "silent"
    start = time.monotonic()
    done = sync(folder, "--mode", "online", "--timeout", 4)
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    assert "1 of 1 runs could not be copied" in done.stderr


@pytest.mark.parametrize("health", ["silent", "sick"])
def test_a_server_that_never_answers_costs_the_run_nothing(config, server, health, read, capsys):
    server.health = health
    settings = config("wandb.timeout_seconds=16")
    record = RunRecord(settings)
    start = time.monotonic()
    tracker = start_tracking(settings, record.open())
    with record.closing():
        tell(record, tracker, LINES)
        for _ in range(100_000):
            tracker.notice()
    assert time.monotonic() - start < 5
    tracker.finish()
    assert time.monotonic() - start < 30
    assert read(record.folder, "run.json")["status"] == "finished"
    assert plain(read_run(record.folder).history) == LINES
    assert "wandb: offline, W&B does not answer (" in capsys.readouterr().out
    assert gone(lambda: services_of(tracker.process.pid))


def test_a_server_that_goes_silent_keeps_the_finished_run_for_a_limited_time(
    config, server, read, capsys
):
    record = RunRecord(config("wandb.timeout_seconds=4"))
    with record.open().closing():
        tracker = start_tracking(record.config, record)
        assert gone(lambda: not server.upserts)
        server.health = "silent"
        tell(record, tracker, LINES)
    start = time.monotonic()
    tracker.finish()
    assert time.monotonic() - start < 15
    assert read(record.folder, "run.json")["status"] == "finished"
    warning = capsys.readouterr().out
    assert f"warning: wandb: up to {len(LINES)} lines did not reach W&B" in warning
    assert f"python scripts/wandb_sync.py {record.folder} rebuilds it" in warning
    assert gone(lambda: services_of(tracker.process.pid))


def test_a_server_that_refuses_is_noticed_at_once(config, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert plain(read_run(attempt(config())).history) == LINES
    assert re.search(
        r"offline, http://127.0.0.1:\d+ cannot be reached; later", capsys.readouterr().out
    )


def test_a_copy_that_is_held_up_holds_nobody_up_and_misses_nothing(config):
    """The pipe is the bounded queue, and the folder has what does not fit into it."""
    settings = config()
    record = RunRecord(settings)
    tracker = start_tracking(settings, record.open())
    os.kill(tracker.process.pid, signal.SIGSTOP)
    many = [{"step": step, "loss": 1 / (step + 1)} for step in range(500)]
    for line in many:
        record.log(**line)
    start = time.monotonic()
    for _ in range(70_000):
        tracker.notice()
    assert time.monotonic() - start < 5
    with pytest.raises(BlockingIOError):
        os.write(tracker.process.stdin.fileno(), NEWS)
    os.kill(tracker.process.pid, signal.SIGCONT)
    with record.closing():
        pass
    tracker.finish()
    assert plain(read_run(record.folder).history) == many


def test_signals_to_the_whole_job_do_not_end_the_copy(config):
    settings = config()
    record = RunRecord(settings)
    with record.open().closing():
        tracker = start_tracking(settings, record)
        tell(record, tracker, LINES[:3])
        assert gone(lambda: not services_of(tracker.process.pid))
        assert gone(lambda: not list(record.folder.glob("wandb/offline-run-*/*.wandb")))
        for pid in [tracker.process.pid, *map(int, services_of(tracker.process.pid))]:
            os.kill(pid, signal.SIGTERM)
        tell(record, tracker, LINES[3:])
    tracker.finish()
    run = read_run(record.folder)
    assert (plain(run.history), run.exit) == (LINES, 0)


def test_a_killed_run_leaves_no_process(config, server, tmp_path):
    settings = config()
    record = RunRecord(settings).open()
    record.log(step=0)
    program = (
        "import time; from pathlib import Path\n"
        "from lora_one.harness.tracking.tracker import WandbTracker\n"
        f"tracker = WandbTracker(Path({str(record.folder)!r}), 20)\n"
        "print(tracker.process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        follower = int(run.stdout.readline())
        assert gone(lambda: not server.upserts)
        assert services_of(follower)
        server.health = "silent"
        run.kill()
    assert gone(lambda: Path(f"/proc/{follower}").exists())
    assert gone(lambda: services_of(follower))


def test_only_rank_0_tracks(config, monkeypatch, tmp_path):
    settings = config()
    record = RunRecord(settings, writes=False)
    assert isinstance(start_tracking(settings, record.open()), NoTracker)
    assert not record.folder.exists()


def test_the_copy_can_be_switched_off_from_outside(config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not (attempt(config()) / "wandb").exists()


def test_a_key_that_is_none_is_said_and_no_error(config, server, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    assert plain(read_run(attempt(config())).history) == LINES
    assert "wandb: offline, no API key that can be used" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_line_ends_well_while_the_server_hangs(
    server, llama_folder, rows_folder, tmp_path
):
    server.health = "silent"
    command = [sys.executable, "run_exp.py", "tracking=wandb", "wandb.timeout_seconds=12"]
    settings = [
        f"model.name={llama_folder}",
        f"dataset.path={rows_folder}",
        f"output_dir={tmp_path / 'results'}",
        "dataset.max_new_tokens=4",
        "model.max_steps=2",
        "peft.lora_r=4",
    ]
    done = subprocess.run(
        [*command, *settings], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in (tmp_path / "results").glob("*/run.json"))
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert plain(read_run(folder).history) == lines
    assert done.stdout.count("wandb: ") == 1
    assert "wandb: offline, W&B does not answer (" in done.stdout
