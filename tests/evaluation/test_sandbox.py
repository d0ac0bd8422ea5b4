"""What an honest program may expect of the sandbox, and how its verdicts read."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from lora_one.evaluation.sandbox import (
    LEVELS,
    REASONS,
    Limits,
    SandboxError,
    judge,
    judge_program,
    launch,
    wire,
)

LIMITS = Limits(cpu_seconds=5, wall_seconds=10, memory_bytes=256 << 20, processes=8)


def run(program, tests, **options):
    return judge_program(program, tests, limits=LIMITS, **options)


def test_a_right_program_passes_and_a_wrong_one_fails_with_the_test_that_failed():
    right = run("def f(x):\n    return x * x", "assert f(3) == 9\nassert f(-2) == 4")
    assert (right.reason, right.detail, right.passed) == ("passed", "", True)
    wrong = run("def f(x):\n    return x + x", "assert f(2) == 4\nassert f(3) == 9, 'square'")
    assert wrong.reason == "failed"
    assert wrong.detail == (
        "AssertionError: square; line 2 of the tests: assert f(3) == 9, 'square'"
    )


@pytest.mark.parametrize(
    ("program", "reason", "detail"),
    [
        ("def f(x) return x", "error", "SyntaxError"),
        ("import no_such_module\ndef f(x): return x", "error", "No module named"),
        ("def g(x): return x", "error", "NameError: name 'f' is not defined"),
        ("def f(x): return x.y", "error", "AttributeError"),
        ("class Own(Exception): pass\ndef f(x): raise Own('why')", "error", "Own: why"),
        ("def f(x): return open('/etc/planted', 'w')", "blocked", "PermissionError|Read-only"),
        ("def f(x): return [0] * 10**11", "memory", "MemoryError"),
        ("def f(x): exit(5)", "error", "NameError"),  # site is not loaded
        ("import sys\ndef f(x): sys.exit(5)", "exited", "status 3 before the tests did"),
        ("import os\ndef f(x): os.abort()", "crashed", "SIGABRT"),
    ],
)
def test_every_failure_has_its_reason(program, reason, detail):
    outcome = run(program, "assert f(1) == 1")
    assert outcome.reason == reason, outcome
    assert reason in REASONS
    assert any(part in outcome.detail for part in detail.split("|")), outcome


VALUES = [
    "None",
    "True",
    "-7",
    "2**9000",
    "-(3**4000)",
    "0.1",
    "float('inf')",
    "1j - 2",
    "'text \\u2028 \\ud800 \\x00'",
    "b'\\x00\\xff'",
    "bytearray(b'ab')",
    "[1, [2, []]]",
    "(1, (2,), ())",
    "{1: 'a', (2, 3): [4], None: {}}",
    "{1, 2, (3, 4)}",
    "frozenset({1, frozenset()})",
    "range(3, 9, 2)",
    "collections.deque([1, 2])",
    "decimal.Decimal('0.10')",
    "fractions.Fraction(1, 3)",
    "collections.Counter('aab')",
    "collections.OrderedDict([('b', 1), ('a', [2])])",
    "datetime.date(2024, 2, 29)",
    "datetime.time(1, 2, 3, 4)",
    "datetime.datetime(2024, 2, 29, 1, tzinfo=datetime.timezone.utc)",
    "datetime.timedelta(-1, 2, 3)",
    "array.array('d', [1, 2.5])",
]


@pytest.mark.parametrize("value", VALUES)
def test_plain_values_arrive_as_they_are(value):
    tests = (
        "import array, collections, datetime, decimal, fractions\n"
        f"assert same({value}) == {value}\nassert type(same({value})) is type({value})\n"
        f"assert same({value}, {value}, key={value}) == ({value}, {value})"
    )
    program = "def same(a, *rest, key=None):\n    return (*rest, key) if rest else a"
    outcome = run(program, tests)
    assert outcome.passed, outcome


def test_subclasses_arrive_as_their_plain_base():
    program = (
        "from collections import *\nfrom enum import IntEnum\n"
        "Point = namedtuple('Point', 'x y')\nclass Colour(IntEnum):\n    RED = 3\n"
        "def f():\n    return Counter('aab'), OrderedDict(a=1), Point(1, 2), Colour.RED"
    )
    assert run(program, "assert f() == ({'a': 2, 'b': 1}, {'a': 1}, (1, 2), 3)").passed


def test_named_tuples_keep_their_fields_and_iterators_give_their_next_value():
    program = (
        "from collections import namedtuple\nPoint = namedtuple('Point', 'x y')\n"
        "Odd = namedtuple('Odd', 'x class', rename=True)\n"
        "def f(point=Point(1, 2)):\n    return point._replace(x=point.x + 1)\n"
        "def odd():\n    return Odd(1, 2)\n"
        "def count():\n    yield 1\n    yield 2\n"
    )
    tests = (
        "assert f().x == 2 and f(f()).x == 3 and Point(5, 6).y == 6 and odd() == (1, 2)\n"
        "numbers = count()\nassert next(numbers) == 1\nassert list(numbers) == [2]"
    )
    outcome = run(program, tests)
    assert outcome.passed, outcome
    assert "StopIteration" in run(program, "it = count()\n[next(it) for _ in range(3)]").detail


def test_what_a_program_says_can_be_written_to_a_file_and_is_short():
    # The second one writes its exception itself, past its own limit.
    long = (
        "import json, os, struct\ndef f():\n"
        "    data = json.dumps({'raised': {'type': 'ValueError', 'text': 'A' * 10**7}}).encode()\n"
        "    for fd in range(3, 64):\n        try:\n"
        "            view = memoryview(struct.pack('>I', len(data)) + data)\n"
        "            while view: view = view[os.write(fd, view):]\n"
        "        except OSError: pass\n    return 1"
    )
    for program in (
        "def f():\n    print('\\x1b[2J')\n    raise ValueError('\\ud800\\n\\x1b[2J')",
        long,
    ):
        outcome = run(program, "assert f() == 1")
        assert outcome.reason == "error", outcome
        assert len(outcome.detail) <= 600
        assert outcome.detail.isprintable()
        assert (outcome.detail + outcome.output).encode()
        assert "\x1b" not in outcome.output


def test_an_end_of_input_in_the_program_is_the_programs_error():
    assert run("def f():\n    return input()", "assert f() == 1").reason == "error"


@pytest.mark.parametrize("home", ["/tmp", "/", "/tmp/nobody"])  # noqa: S108 -- where homes may be
def test_a_home_at_or_above_the_sandboxs_own_folder_costs_no_isolation(home, monkeypatch):
    found = judge.isolation.__wrapped__()
    monkeypatch.setenv("HOME", home)
    assert judge.isolation.__wrapped__() == found


def test_a_weaker_isolation_is_said_with_its_reason():
    assert judge.Isolation("unshare", {}).remark is None
    weaker = judge.Isolation("rlimits", {"unshare": "no namespaces"}).remark
    assert "'rlimits'" in weaker
    assert "not attackers" in weaker
    assert "unshare: no namespaces" in weaker


def test_objects_of_the_program_can_be_made_written_and_handed_back():
    # As MBPP's problems with trees and with pairs do.
    program = (
        "class Node:\n    def __init__(self, value):\n"
        "        self.value, self.left, self.right = value, None, None\n"
        "def depth(node):\n"
        "    return 0 if node is None else 1 + max(depth(node.left), depth(node.right))\n"
        "def leaves(node):\n    yield node.value\n"
    )
    tests = (
        "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)\n"
        "assert depth(root) == 3\nassert root.left.value == 2\nassert root == root\n"
        "assert root != root.left\nassert list(leaves(root)) == [1]\n"
        "assert depth({'a': root}['a']) == 3"
    )
    assert run(program, tests).passed


def test_exceptions_of_built_in_kinds_can_be_caught_by_the_tests():
    tests = "try:\n    f(-1)\nexcept ValueError as error:\n    assert str(error) == 'negative'\n"
    tests += "else:\n    assert False"
    assert run("def f(x):\n    raise ValueError('negative')", tests).passed
    assert run("def f(x):\n    return x", tests).reason == "failed"


def test_arguments_go_by_value():
    tests = "values = [3, 1]\nassert f(values) == [1, 3]\nassert values == [3, 1]"
    assert run("def f(x):\n    x.sort()\n    return x", tests).passed


def test_the_benchmarks_helpers_are_its_own_and_the_entry_point_is_the_programs():
    prelude = "def helper(x):\n    return x + 1\ndef f(x):\n    pass"
    program = "def helper(x):\n    return 10\ndef f(x):\n    return 10"
    outcome = run(program, "assert f(1) == helper(1)", prelude=prelude, names=["f"])
    assert outcome.reason == "failed"
    assert run(program, "assert f(1) == 10", prelude=prelude, names=["f"]).passed


def test_a_program_may_define_a_name_of_python_if_the_benchmark_asks_for_it():
    program = "def sum(a, b):\n    return 6\ndef set(a):\n    return 0\ndef f():\n    return [5]"
    assert run(program, "assert sum(10, 15) == 6", names=["sum"]).passed
    # ... and only then: else comparisons through Python's own functions could be forged.
    assert run(program, "assert set(f()) == set([7])").reason == "failed"
    assert run("import math\nmath.isclose = print", "assert not math.isclose(1, 2)").passed


def test_printed_text_is_kept_and_has_no_part_in_the_verdict():
    outcome = run("print('hello')\ndef f():\n    print('passed')\n    return 1", "assert f() == 2")
    assert outcome.reason == "failed"
    assert outcome.output == "hello\npassed\n"
    assert outcome.isolation in LEVELS


def test_what_a_script_would_run_stays_out():
    program = "def f():\n    return __name__\nif __name__ == '__main__':\n    raise ValueError"
    assert run(program, "assert f() != '__main__'").passed


def test_dataclasses_typing_and_recursion_work():
    program = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from typing import List, Optional\n@dataclass\nclass P:\n    x: Optional[int] = 3\n"
        "def f(n: int) -> List[int]:\n    return [P().x] if n == 0 else f(n - 1)"
    )
    assert run(program, "assert f(500) == [3]").passed


def test_sets_have_one_order_in_every_evaluation():
    program = "def f():\n    return list({'a', 'b', 'c', 'd', 'e', 'f'})"
    orders = {run(program, "raise ValueError(f())").detail for _ in range(3)}
    assert len(orders) == 1


@pytest.mark.parametrize("tests", ["assert f(", "assert f(1) == 1"])
def test_tests_that_are_no_python_are_the_sandboxs_failure_and_not_the_programs(tests):
    prelude = "" if tests.endswith("(") else "1 / 0"
    with pytest.raises(SandboxError, match=r"SyntaxError|ZeroDivisionError"):
        run("def f(x):\n    return x", tests, prelude=prelude)


def test_many_programs_can_be_judged_side_by_side():
    results = {}

    def one(number):
        results[number] = run(
            f"def f():\n    return {number}", f"assert f() == {number % 3}"
        ).passed

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: number < 3 for number in range(6)}


def test_nothing_is_left_open_or_running():
    def mine():
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
        return len(list(Path("/proc/self/fd").iterdir())), children.read_text().split()

    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc")
    run("def f():\n    return 1", "assert f() == 1")
    before = mine()
    for program in ("def f():\n    return 1", "import os\nos._exit(0)", "while True: pass"):
        judge_program(program, "assert f() == 1", limits=Limits(cpu_seconds=0.3, wall_seconds=0.5))
    assert mine() == before


def test_the_sandbox_ends_with_the_process_that_judges(tmp_path):
    marker = tmp_path / "marker"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from lora_one.evaluation.sandbox import judge_program, isolation\nisolation()\n"
        "print('now', flush=True)\n"
        "judge_program('import time\\ntime.sleep(60)', 'assert 0')\n"
    )
    repository = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", script, repository, str(marker)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    cells = _wait_for(lambda: _cells_of(process.pid), bool)
    process.kill()
    process.wait()
    assert _wait_for(lambda: [pid for pid in cells if Path("/proc", pid).exists()], _empty) == []


def test_without_namespaces_the_program_itself_ends_with_the_process_that_judges():
    try:
        run("", "", level="rlimits")
    except SandboxError as error:
        pytest.skip(str(error))
    mark = f"started-{os.getpid()}"
    program = f"import time\nopen({mark!r}, 'w').close()\ntime.sleep(60)"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from lora_one.evaluation.sandbox import judge_program\n"
        f"judge_program({program!r}, 'assert 0', level='rlimits')\n"
    )
    repository = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, "-c", script, repository])
    temporary = Path(tempfile.gettempdir())
    found = _wait_for(lambda: list(temporary.glob(f"sandbox-*/0/{mark}")), bool)
    cells = _cells_of(process.pid)
    process.kill()
    process.wait()
    shutil.rmtree(found[0].parents[1])
    assert len(cells) >= 2  # the program and its guard, and those of the tests
    assert _wait_for(lambda: [pid for pid in cells if Path("/proc", pid).exists()], _empty) == []


def test_a_level_that_cannot_be_had_is_passed_over_and_the_reason_kept(monkeypatch):
    def refuse(level):
        if level != "rlimits":
            raise SandboxError(f"no {level} here")
        return judge.Outcome("passed", "", "", 0.0, level)

    monkeypatch.setattr(judge, "_probe", refuse)
    found = judge.isolation.__wrapped__()
    assert found.level == "rlimits"
    assert found.refused == {
        "unshare": "no unshare here",
        "bubblewrap": "no bubblewrap here",
    }
    monkeypatch.setattr(judge, "LEVELS", ("unshare",))
    with pytest.raises(SandboxError, match=r"no sandbox works on this machine .*no unshare here"):
        judge.isolation.__wrapped__()


def test_an_interpreter_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(launch, "_BOOT", "raise SystemExit('broken installation')")
    with pytest.raises(SandboxError, match="did not start: broken installation"):
        run("def f():\n    return 1", "assert f() == 1")


def test_malformed_messages_are_refused():
    def resolve(number):
        return number

    for message in (
        {"tuple": 3},
        {"no such": 1},
        {"a": 1, "b": 2},
        {"dict": [[1]]},
        {"set": [[1]]},
        {"int": "x"},
        {"range": [1, 2, 0]},
        {"Decimal": "x"},
        {"date": 3},
        {"timedelta": [10**30]},
        {"array": ["z", []]},
        {"namedtuple": ["T", ["x", "x"], [1, 2]]},
        {"namedtuple": ["T", ["__eq__"], [1]]},
        {"namedtuple": ["T", ["x=print()"], [1]]},
        {"namedtuple": ["T", [["x"]], [1]]},
        {"reference": []},
    ):
        with pytest.raises(wire.ProtocolError):
            wire.decode(message, resolve)
    read, write = os.pipe()
    try:
        os.write(write, b"\xff\xff\xff\xff")
        with pytest.raises(wire.ProtocolError, match="the limit is 10"):
            wire.receive(read, 10)
        os.write(write, b"\x00\x00\x00\x02[[")
        with pytest.raises(wire.ProtocolError, match="malformed message"):
            wire.receive(read, 10)
    finally:
        os.close(read)
        os.close(write)


def _cells_of(pid):
    """The processes below ``pid`` whose command line starts a sandbox."""
    parents, cells = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[folder.name] = fields[1]
            if b"sandbox.cell" in (folder / "cmdline").read_bytes():
                cells.append(folder.name)
        except OSError:
            continue

    def below(child):
        while child in parents and child != str(pid):
            child = parents[child]
        return child == str(pid)

    return [cell for cell in cells if below(cell)]


def _wait_for(look, enough):
    for _ in range(200):
        found = look()
        if enough(found):
            return found
        threading.Event().wait(0.05)
    return found


def _empty(found):
    return not found
