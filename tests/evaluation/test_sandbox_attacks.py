"""Hostile programs: each is contained, judged not passed, in bounded time.

The tests ask for ``f(2) == 4``. An attack that needs an answer gives the wrong one, so that only a
forged verdict could pass.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lora_one.evaluation.sandbox import LEVELS, Limits, SandboxError, isolation, judge_program

LIMITS = Limits(
    cpu_seconds=5,
    wall_seconds=10,
    memory_bytes=256 << 20,
    processes=12,
    file_bytes=4 << 20,
    work_bytes=16 << 20,
    output_bytes=100_000,
    reply_bytes=1 << 20,
)
SHORT = replace(LIMITS, cpu_seconds=0.5, wall_seconds=1)  # where the time limit must end it
TESTS = "assert f(2) == 4"
WRONG = "\ndef f(x):\n    return 5\n"
BOUND = 15.0  # seconds for one attack, the start of both sandboxes on a busy machine included

RESOURCES = {
    "endless loop": ("while True: pass", {"timeout"}),
    "endless loop in the call": ("def f(x):\n    while True: pass", {"timeout"}),
    "loop that ignores the limit's signal": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        {"timeout", "crashed"},
    ),
    "stopping itself": (
        "import os, signal, threading\nsignal.raise_signal(signal.SIGSTOP)",
        {"timeout"},
    ),
    "fork bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        {"timeout"},
    ),
    "thread bomb": (
        "import threading, time\n"
        "while True:\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        {"error", "memory"},
    ),
    "memory hog": ("hog = []\nwhile True: hog.append(bytearray(10**7))", {"memory"}),
    "memory hog in one piece": ("hog = bytearray(10**11)", {"memory"}),
    "memory hog of many processes": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        break\n"
        "hog = bytearray(80 << 20)\ntime.sleep(60)",
        {"memory", "timeout"},
    ),
    "10 GB file": (
        "with open('big', 'wb') as file:\n    for _ in range(10_000): file.write(bytes(10**6))",
        {"error"},
    ),
    "10 GB sparse file": ("open('big', 'wb').truncate(10**10)", {"error"}),
    "endless output": ("while True: print('x' * 1000)", {"output"}),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    "reply too large": ("def f(x):\n    return 'x' * 10**7", {"failed"}),
    "reply too deep": (
        "def f(x):\n    deep = []\n    for _ in range(10**5): deep = [deep]\n    return deep",
        {"error"},
    ),
    "deep recursion": ("def f(x):\n    return f(x)", {"error"}),
    "sleeping past the limit": ("import time\ntime.sleep(600)", {"timeout"}),
}
ENDINGS = {
    "os._exit(0)": ("import os\nos._exit(0)", {"exited"}),
    "os._exit(0) in the call": ("import os\ndef f(x):\n    os._exit(0)", {"exited"}),
    "sys.exit(0)": ("import sys\nsys.exit(0)", {"exited"}),
    "SystemExit in the call": ("def f(x):\n    raise SystemExit(0)", {"exited"}),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", {"crashed", "blocked"}),
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)" + WRONG, {"failed", "blocked"}),
    "interrupting process 1": (
        "import os, signal, time\nos.kill(1, signal.SIGINT)\ntime.sleep(0.3)" + WRONG,
        {"failed", "blocked"},
    ),
    "signalling the group": ("import os\nos.killpg(0, 9)" + WRONG, {"crashed", "blocked"}),
}
FORGERIES = {
    "an equal that always agrees": (
        "class Yes:\n    def __eq__(self, other): return True\n    __ne__ = __hash__ = None\n"
        "def f(x): return Yes()",
        {"failed"},
    ),
    "a number that always agrees": (
        "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "def f(x): return Yes(5)",
        {"failed"},
    ),
    "builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.Exception = type('E', (), {})\n"
        "builtins.isinstance = lambda *a: True\nbuiltins.compile = builtins.exec = print" + WRONG,
        {"failed", "error", "exited"},
    ),
    "stdout and print": (
        "import sys, io, builtins\nsys.stdout = sys.stderr = io.StringIO()\n"
        "builtins.print = lambda *a: None\nprint('passed')" + WRONG,
        {"failed"},
    ),
    "modules of the tester": (
        "import sys\nfor name, module in list(sys.modules.items()):\n"
        "    if 'sandbox' in name or name in ('json', 'unittest'):\n"
        "        for key in list(vars(module)):\n"
        "            if callable(getattr(module, key)):\n"
        "                setattr(module, key, lambda *a, **k: {'reason': 'passed'})" + WRONG,
        None,
    ),
    "frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for key in ('tests', 'program', 'task', 'order'):\n"
        "        frame.f_locals.pop(key, None); frame.f_globals.pop(key, None)\n"
        "    frame = frame.f_back" + WRONG,
        {"failed", "error", "exited"},
    ),
    "expected values on the heap": (
        "import gc\ndef f(x):\n"
        "    text = 'assert f(2' + ') == '\n"
        "    for thing in gc.get_objects():\n"
        "        if isinstance(thing, dict):\n"
        "            for value in list(thing.values()):\n"
        "                if isinstance(value, str) and text in value and len(value) < 50:\n"
        "                    return int(value[-1])\n    return 5",
        {"failed"},
    ),
    "verdict to every descriptor": (
        "import os, json, struct\n"
        "verdict = json.dumps({'verdict': {'reason': 'passed', 'detail': ''}}).encode() + b'\\n'\n"
        "for fd in range(64):\n    try: os.write(fd, verdict)\n    except OSError: pass" + WRONG,
        {"failed", "error"},
    ),
    "replies sent ahead": (
        "import os, json, struct\n"
        "def frame(m):\n    d = json.dumps(m).encode()\n    return struct.pack('>I', len(d)) + d\n"
        "for fd in range(3, 64):\n    try:\n"
        "        os.write(fd, frame({'loaded': True}) + frame({'verdict': {'reason': 'passed'}}))\n"
        "    except OSError: pass" + WRONG,
        {"failed", "error"},
    ),
    "closing every descriptor": (
        "import os\nos.closerange(0, 64)" + WRONG,
        {"exited", "error", "failed"},
    ),
    "atexit": (
        "import atexit, os\natexit.register(lambda: print('passed'))\n"
        "atexit.register(os._exit, 0)" + WRONG,
        {"failed"},
    ),
    "threads that outlive the tests": (
        "import threading\ndef run():\n    while True: pass\n"
        "threading.Thread(target=run).start()" + WRONG,
        {"failed"},
    ),
    "tracing": ("import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(print)" + WRONG, None),
    "raising the tester's exceptions": ("def f(x):\n    raise AssertionError", {"error"}),
    "ending the tests' own iteration": ("def f(x):\n    raise StopIteration", {"error"}),
    "ending it from an object": (
        "class Odd:\n    def __getattr__(self, name): raise StopAsyncIteration\n"
        "    def __len__(self): raise StopIteration\n"
        "    def __getitem__(self, key): raise StopIteration\n"
        "def f(x):\n    return Odd()",
        {"failed"},
    ),
    "an exception that is no exception": (
        "class E(Exception):\n    def __str__(self): raise self\ndef f(x):\n    raise E",
        {"error"},
    ),
}
ATTACKS = RESOURCES | ENDINGS


@pytest.fixture(scope="module", params=LEVELS)
def level(request):
    """Each level that works on this machine for this user."""
    try:
        outcome = judge_program("def f(x):\n    return x * x", TESTS, level=request.param)
    except SandboxError as error:
        pytest.skip(f"{request.param}: {error}")
    assert outcome.passed, outcome
    return request.param


@pytest.fixture
def isolated(level):
    if level == "rlimits":
        pytest.skip("rlimits alone do not promise this")
    return level


def judge(program, level, tests=TESTS, limits=LIMITS):
    start = time.monotonic()
    outcome = judge_program(program, tests, level=level, limits=limits)
    assert time.monotonic() - start < BOUND
    assert outcome.isolation == level
    return outcome


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained_and_not_passed(name, level):
    program, reasons = ATTACKS[name]
    outcome = judge(program, level, limits=SHORT if "timeout" in (reasons or ()) else LIMITS)
    assert not outcome.passed, outcome
    assert reasons is None or outcome.reason in reasons, outcome


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_verdict_is_not_passed(name):
    # What keeps the verdict apart is the same at every level.
    program, reasons = FORGERIES[name]
    outcome = judge(program, isolation().level)
    assert not outcome.passed, outcome
    assert reasons is None or outcome.reason in reasons, outcome


@pytest.mark.parametrize("name", [name for name in FORGERIES if name.startswith("ending")])
@pytest.mark.parametrize(
    "tests",
    [
        "assert all(map(lambda x: f(x) == x + 41, range(5)))",
        "for got, wanted in zip(map(f, [2]), [4]):\n    assert got == wanted",
        "assert all(map(lambda x: f(x).value == 4 and len(f(x)) == 1, [2]))",
        "assert all(map(lambda x: f(x)[0] == 4, [2]))",
        "assert all(map(lambda x: next(f(x)) == 4, [2]))",
        "for thing in f(2) if f(2) == 4 else map(f, [2]):\n    assert thing == 4",
    ],
)
def test_no_test_that_iterates_is_ended_by_the_program(name, tests):
    assert not judge(FORGERIES[name][0], isolation().level, tests).passed


def test_files_outside_cannot_be_read(level, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    places = [str(secret), str(Path(__file__)), str(Path.home() / ".profile"), "/etc/passwd"]
    program = "def f(path):\n    with open(path) as file:\n        return file.read()"
    for place in places:
        outcome = judge(program, level, f"assert not f({place!r})")
        assert outcome.reason in {"error", "blocked"}, outcome


def test_the_home_folder_shows_nothing_of_its_own(level):
    home = Path.home()
    program = "import os\ndef f(path):\n    return os.listdir(path)"
    hidden = {p.name for p in home.iterdir() if p.is_file()} if home.is_dir() else set()
    outcome = judge(program, level, f"assert set(f({str(home)!r})) & {hidden!r}")
    assert not outcome.passed, outcome


def test_the_environment_is_empty(level, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hf_secret")
    program = (
        "import os\ndef f():\n    found = dict(os.environ)\n"
        "    for folder in ('self', '1', str(os.getppid())):\n        try:\n"
        "            found[folder] = open(f'/proc/{folder}/environ').read()\n"
        "        except OSError: pass\n    return 'SECRET_TOKEN' in str(found), dict(os.environ)"
    )
    assert judge(program, level, "assert f() == (False, {})").passed


def test_nothing_outside_is_written(level, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("unchanged")
    places = [
        tmp_path / "planted",
        Path(__file__).parent / "planted",
        Path.home() / "planted-by-a-sandbox-test",
    ]
    program = (
        "import os, shutil\ndef f(places, kept):\n    done = 0\n"
        "    for place in [*places, kept]:\n        try:\n"
        "            open(place, 'w').write('x'); done += 1\n        except OSError: pass\n"
        "    for place in (kept, os.path.dirname(kept)):\n"
        "        shutil.rmtree(place, ignore_errors=True)\n"
        "        try: os.remove(place)\n        except OSError: pass\n    return done\n"
    )
    outcome = judge(program, level, f"assert f({[str(p) for p in places]!r}, {str(kept)!r}) == 0")
    assert outcome.reason in {"passed", "blocked"}, outcome
    assert not any(place.exists() for place in places)
    assert kept.read_text() == "unchanged"


def test_the_working_folder_is_empty_writable_and_may_be_deleted(level):
    program = (
        "import os, shutil\ndef f():\n    before = os.listdir('.')\n"
        "    open('note', 'w').write('x')\n    after = os.listdir('.')\n"
        "    shutil.rmtree(os.getcwd(), ignore_errors=True)\n    return before, after"
    )
    assert judge(program, level, "assert f() == ([], ['note'])").passed


def test_folders_too_deep_to_be_removed_level_by_level_are_removed(level):
    if level != "rlimits":
        pytest.skip("with namespaces the folder is a file system, which goes as a whole")
    program = (
        "import os\nprint(os.getcwd())\nopen('file', 'w').close()\nos.symlink('file', 'link')\n"
        "at = os.open('.', os.O_RDONLY)\nfor _ in range(1200):\n"
        "    os.mkdir('deep', dir_fd=at)\n    below = os.open('deep', os.O_RDONLY, dir_fd=at)\n"
        "    os.close(at)\n    at = below\nos.chmod('deep', 0)" + WRONG
    )
    outcome = judge(program, level)
    assert outcome.reason == "failed", outcome
    assert not Path(outcome.output.strip()).parent.exists()


def test_two_programs_do_not_see_each_others_files(level):
    program = "import os\ndef f():\n    open('note', 'w').close()\n    return os.listdir('.')"
    for _ in range(2):
        assert judge(program, level, "assert f() == ['note']").passed


def test_nothing_answers_on_the_network(level):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        program = (
            "import socket\ndef f(port):\n"
            "    socket.create_connection(('127.0.0.1', port), timeout=1)\n    return 4"
        )
        outcome = judge(program, level, f"assert f({port}) == 4")
        assert outcome.reason in {"error", "blocked"}, outcome
        with pytest.raises(TimeoutError):
            server.accept()


def test_abstract_sockets_of_the_machine_are_out_of_reach(level):
    name = f"\0sandbox-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        program = (
            "import socket\ndef f(name):\n    s = socket.socket(socket.AF_UNIX)\n"
            "    s.connect(name)\n    return 4"
        )
        outcome = judge(program, level, f"assert f({name!r}) == 4")
        assert outcome.reason in {"error", "blocked"}, outcome


def test_children_in_sessions_of_their_own_end_with_the_program(isolated):
    marker = f"sandbox-test-{os.getpid()}"
    program = (
        "import os, sys, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0:\n            os.setsid()\n"
        f"            os.execv(sys.executable, ['python', '-S', '-c', {_SLEEP!r}, {marker!r}])\n"
        "            os._exit(1)\n        time.sleep(600)\ntime.sleep(0.2)\n" + WRONG
    )
    assert judge(program, isolated).reason == "failed"
    assert _gone(lambda: _running(marker))


def test_children_without_namespaces_end_with_the_program(level):
    if level != "rlimits":
        pytest.skip("inside a PID namespace the numbers mean nothing outside")
    program = (
        "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0:\n            os.setsid()\n"
        "            os.write(1, b'%d ' % os.getpid())\n            time.sleep(600)\n"
        "        os._exit(0)\ntime.sleep(0.2)\n" + WRONG
    )
    outcome = judge(program, level)
    assert outcome.reason == "failed"
    pids = outcome.output.split()
    assert len(pids) == 3
    assert _gone(lambda: [pid for pid in pids if Path("/proc", pid).exists()])


def test_a_process_name_that_is_no_text_changes_no_verdict(isolated):
    program = (
        "import ctypes, time\nctypes.CDLL(None).prctl(15, b'\\xff)', 0, 0, 0)\ntime.sleep(0.1)\n"
        "def f(x):\n    return x * x"
    )
    assert judge(program, isolated).passed


def test_processor_time_of_children_that_have_ended_counts(isolated):
    program = (
        "import os, time\nwhile True:\n    if os.fork() == 0:\n"
        "        while time.process_time() < 0.2: pass\n        os._exit(0)\n    os.wait()"
    )
    outcome = judge(program, isolated, limits=replace(LIMITS, cpu_seconds=0.5, wall_seconds=6))
    assert (outcome.reason, outcome.detail) == ("timeout", "the limit on processor time was passed")


def test_every_process_of_the_machine_is_out_of_reach_of_signals(isolated):
    program = (
        "import os, signal\ndef f(pids):\n    reached = 0\n    for pid in pids:\n"
        "        try: os.kill(pid, 0); reached += 1\n        except OSError: pass\n"
        "    for sig in (signal.SIGTERM, signal.SIGKILL):\n"
        "        for pid in (-1, 1):\n"
        "            try: os.kill(pid, sig)\n            except OSError: pass\n    return reached"
    )
    mine = [os.getpid(), os.getppid()]
    assert judge(program, isolated, f"assert f({mine!r}) == 0").passed


def test_kernel_interfaces_that_could_lead_out_are_refused(isolated):
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef f():\n    return [\n"
        "        libc.unshare(0x10000000), libc.unshare(0x00020000),\n"
        "        libc.mount(b'none', b'/', None, 32 | 4096, None),\n"
        "        libc.mount(b'proc', b'/tmp', b'proc', 0, None),\n"
        "        libc.umount2(b'/', 2), libc.chroot(b'/tmp'), libc.ptrace(16, 1, 0, 0),\n"
        "        libc.setuid(0), libc.sethostname(b'x', 1)]\n"
    )
    outcome = judge(program, isolated, "assert set(f()) == {-1}")
    assert outcome.passed, outcome


needs_filter = pytest.mark.skipif(
    os.uname().machine not in ("x86_64", "aarch64"), reason="no system call filter for this machine"
)


@needs_filter
def test_memory_that_nobody_is_charged_for_and_odd_sockets_are_refused(isolated):
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef f():\n    return [\n"
        "        libc.shmget(0, 4096, 0o1600), libc.msgget(0, 0o1600), libc.semget(0, 1, 0o1600),\n"
        "        libc.memfd_create(b'x', 0), libc.socket(40, 1, 0), libc.socket(38, 5, 0),\n"
        "        shared(-1), os.path.exists('/dev/zero') - 1]\n"
        "import mmap, os\ndef shared(fd):\n    try: mmap.mmap(fd, 4096)\n"
        "    except PermissionError: return -1\n"
    )
    outcome = judge(program, isolated, "assert set(f()) == {-1}")
    assert outcome.passed, outcome


@needs_filter
def test_without_namespaces_native_code_signals_connects_and_executes_nothing():
    script = (
        "import ctypes, os, signal, sys\nsys.path.insert(0, sys.argv[1])\n"
        "from lora_one.evaluation.sandbox import kernel, syscalls\nkernel.drop_privileges()\n"
        "assert syscalls.refuse_calls(namespaces=False)\nlibc = ctypes.CDLL(None)\n"
        "parent = os.getppid()\n"
        "print([libc.kill(parent, 0), libc.kill(-1, 0), libc.kill(0, 0), libc.socket(1, 1, 0),\n"
        "    libc.socket(2, 1, 0), libc.execv(b'/bin/true', 0), libc.ptrace(16, parent, 0, 0)])\n"
        "print(libc.kill(os.getpid(), 0))\nsignal.raise_signal(signal.SIGTERM)"
    )
    repository = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-u", "-c", script, repository]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == f"{[-1] * 7}\n0\n", done.stderr
    assert done.returncode == -signal.SIGTERM


def test_the_descriptors_of_the_outside_are_not_inherited(level, tmp_path):
    with (tmp_path / "open.txt").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        program = (
            "import os, stat\ndef f():\n    kinds = []\n    for fd in range(3, 60):\n"
            "        try: kinds.append(stat.S_ISFIFO(os.fstat(fd).st_mode))\n"
            "        except OSError: pass\n    return kinds"
        )
        assert judge(program, level, "assert f() == [True, True]").passed


def test_isolation_names_a_level_that_was_tried():
    assert isolation().level in LEVELS
    assert set(isolation().refused) == set(LEVELS[: LEVELS.index(isolation().level)])


_SLEEP = "import time; time.sleep(600)"


def _gone(remaining):
    deadline = time.monotonic() + 2
    while remaining() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not remaining()


def _running(marker):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return [pid for pid in found if pid != str(os.getpid())]
