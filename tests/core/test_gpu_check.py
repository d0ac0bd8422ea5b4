"""What ``scripts/gpu_check.py`` asks of ``scripts/benchmark.py``, which no test runs at 7 B."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def asked(monkeypatch):
    """Let the benchmark read its arguments and measure nothing; return what it was asked for."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import benchmark
    import gpu_check

    found = []

    def measure(arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
        benchmark.main()
        names = [name for name in benchmark.INIT if name not in found[-1].skip]
        row = {"seconds": 1.0, "cpu_seconds": 1.0, "mib": 1024.0}
        return {"table": dict.fromkeys(names, row), "errors": {"clear_gap": 1e-4}}

    monkeypatch.setitem(benchmark.BENCHMARKS, "init", lambda given: found.append(given) or [])
    monkeypatch.setattr(gpu_check, "measure", measure)
    for part in (gpu_check.initialisation, gpu_check.accuracy):
        checks, _ = part()
        assert all(check.passed for check in checks)
    return found


def test_a_training_step_of_7_b_is_measured_on_as_many_rows_as_fit_80_gb(asked):
    """Its activations are 2.1 GiB a layer for 8 x 1024 tokens, 32 times, beside 12.6 GiB."""
    rows = {given.rows for given in asked if "LoRA training step" not in given.skip}
    assert rows == {"4"}
    timed = {given.rows for given in asked if "lora_one.initialize" not in given.skip}
    assert timed == {"4", "8"}
