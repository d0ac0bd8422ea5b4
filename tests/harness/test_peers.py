"""The ranks of one command agree, and end together: real processes, without torch."""

import signal
import socket
import textwrap
import time

import pytest

from lora_one.harness.distributed import peers
from lora_one.harness.distributed.peers import meeting

from .launching import finish, srun, start

PRELUDE = """
import os, signal, sys, time
from lora_one.errors import InputError, NonFiniteError, PreemptedError
from lora_one.harness.exit_status import outcome
from lora_one.harness.distributed.peers import agree, gather, on_end, share, together
from lora_one.harness.distributed.ranks import identify, is_main, rank

def body():
"""
# What the command line makes of errors, without Hydra's second to import.
LAUNCH = """
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    identify()
    with together():
        body()
except (InputError, NonFiniteError, PreemptedError, RuntimeError, KeyboardInterrupt) as error:
    status, word = outcome(error)
    if is_main():
        print(f"{word}: {error}", file=sys.stderr, flush=True)
    sys.exit(status)
"""


def script(body: str) -> list[str]:
    """A program whose ranks do ``body`` together."""
    return ["-c", PRELUDE + textwrap.indent(textwrap.dedent(body), "    ") + LAUNCH]


def statuses(answers):
    return [answer.status for answer in answers]


def said(answers):
    return "".join(answer.err for answer in answers)


def test_values_are_shared_gathered_and_agreed_on():
    answers = srun(
        script("""
        agree("configuration", {"b": [1, {"c": None}], "a": 0.1})
        print(share({"from": rank()}), gather(rank() * 10))
        """),
        3,
    )
    assert statuses(answers) == [0, 0, 0], said(answers)
    assert {answer.out for answer in answers} == {"{'from': 0} [0, 10, 20]\n"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ('{"a": {"b": [1, rank() // 2]}}', "a.b.1 is 0 on rank 0 and 1 on rank 2"),
        ('{"a": 1} if rank() else {}', "a is missing on rank 0 and given on rank 1"),
        ("rank()", "it is 0 on rank 0 and 1 on rank 1"),
    ],
)
def test_a_disagreement_is_bad_input_on_all_ranks_and_said_once(values, message):
    answers = srun(script(f'agree("configuration", {values})'), 3)
    assert statuses(answers) == [2, 2, 2]
    assert said(answers).startswith(f"error: the ranks disagree on the configuration: {message}.")
    assert said(answers).count("\n") == 1


def test_an_error_of_one_rank_ends_the_others_and_is_said_once():
    answers = srun(
        script("""
        if rank() == 1:
            time.sleep(0.5)
            raise NonFiniteError("step 3: loss nan")
        with on_end(lambda ending: print("closed:", ending, flush=True)):
            time.sleep(600)
        """),
        3,
    )
    error = f"rank 1 on host {socket.gethostname()}: NonFiniteError: step 3: loss nan"
    assert statuses(answers) == [1, 1, 1]
    assert said(answers) == f"failed: {error}\n"
    assert answers[0].out == f"closed: {error}\n"


def test_an_unexpected_error_comes_with_its_traceback():
    answers = srun(
        script("""
        if rank() == 1:
            {}["key"]
        time.sleep(600)
        """),
        2,
    )
    assert statuses(answers) == [1, 1]
    assert answers[0].err.startswith("Traceback")
    assert answers[0].err.endswith("KeyError: 'key'\n")


def test_bad_input_of_all_ranks_is_said_by_rank_0_alone():
    answers = srun(script('raise InputError("7 is odd")'), 3)
    assert statuses(answers) == [2, 2, 2]
    assert said(answers) == "error: 7 is odd\n"


def test_bad_input_of_one_rank_is_bad_input_of_all():
    answers = srun(
        script("""
        if rank() == 1:
            raise InputError("no such file here")
        time.sleep(600)
        """),
        2,
    )
    assert statuses(answers) == [2, 2]
    assert said(answers) == f"error: rank 1 on host {socket.gethostname()}: no such file here\n"


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_the_others(victim):
    answers = srun(
        script(f"""
        if rank() == {victim}:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
        """),
        3,
    )
    expected = [1, 1, 1]
    expected[victim] = -signal.SIGKILL
    assert statuses(answers) == expected
    assert said(answers).startswith(f"failed: rank {victim} on host ")
    assert said(answers).count("ended without a word") == 1


def test_the_echo_of_a_death_is_not_taken_for_the_first_error():
    answers = srun(
        script("""
        if rank() == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("Connection closed by peer")
        """),
        3,
    )
    assert statuses(answers) == [1, 1, -signal.SIGKILL]
    assert said(answers).count("\n") == 1
    assert "rank 2" in said(answers)


def test_a_child_of_a_rank_does_not_keep_its_connection_open():
    answers = srun(
        script("""
        if rank() == 1:
            if os.fork() == 0:
                os.close(1), os.close(2)
                time.sleep(30)
                os._exit(0)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        with on_end(lambda _: print(time.monotonic() - started, flush=True)):
            time.sleep(600)
        """),
        2,
    )
    assert statuses(answers) == [1, -signal.SIGKILL]
    assert float(answers[0].out) < 20


@pytest.mark.parametrize("first", [0, 1])
def test_a_preempted_rank_preempts_the_others(first):
    answers = srun(
        script(f"""
        if rank() == {first}:
            raise PreemptedError("time limit")
        time.sleep(0.5)
        raise RuntimeError("Connection closed by peer")
        """),
        2,
    )
    assert statuses(answers) == [75, 75]
    assert "time limit" in said(answers)
    assert said(answers).count("\n") == 1


def test_an_interrupted_command_is_interrupted_on_all_ranks():
    ranks = start(script('share(0); print("here", flush=True); time.sleep(600)'), 2)
    for process in ranks:
        assert process.stdout.readline() == "here\n"
    for process in ranks:
        process.terminate()
        process.terminate()
    answers = finish(ranks)
    assert statuses(answers) == [130, 130]
    assert said(answers) == "interrupted: \n"


def test_rank_0_waits_for_the_others_to_end_well():
    answers = srun(
        script("""
        if rank() == 1:
            time.sleep(1.5)
            raise NonFiniteError("late")
        """),
        3,
    )
    assert statuses(answers) == [1, 1, 1]
    assert said(answers).count("late") == 1


def test_ranks_that_never_came_are_named():
    ranks = start(script("pass"), 4, LORA_ONE_JOIN_SECONDS="3")
    for absent in (1, 3):
        ranks[absent].kill()
    answers = finish(ranks)
    assert answers[0].status == answers[2].status == 1
    assert said(answers).startswith("failed: ranks 1, 3 of 4 did not come to rank 0 on ")
    assert said(answers).count("\n") == 1


def test_a_rank_that_does_not_find_rank_0_says_so():
    ranks = start(script("pass"), 3, LORA_ONE_JOIN_SECONDS="2")
    ranks[0].kill()
    answers = finish(ranks)
    assert statuses(answers)[1:] == [1, 1]
    assert said(answers).startswith("failed: rank 1 on ")
    assert said(answers).count("did not find rank 0 at MASTER_ADDR=127.0.0.1") == 1


def test_a_wait_that_is_no_number_is_bad_input():
    answers = srun(script("pass"), 2, LORA_ONE_JOIN_SECONDS="soon")
    assert statuses(answers) == [2, 2]
    assert said(answers) == "error: LORA_ONE_JOIN_SECONDS=soon: expected a number of seconds.\n"


def test_strangers_and_taken_ports_do_not_matter(monkeypatch):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "10999")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "identity", lambda: "what the ranks hash below")
    first, second, *_ = meeting.ports("peers")
    come_late = script("""
    share(0)
    print("met")
    """)
    come_late[1] = (
        "import time, sys; from lora_one.harness.distributed.peers import meeting\n"
        "meeting.identity = lambda: 'what the ranks hash below'\n"
        "time.sleep({rank} * 2)\n" + come_late[1]
    )
    with socket.create_server(("127.0.0.1", first)) as taken:
        taken.settimeout(60)
        ranks = start(come_late, 2, MASTER_PORT="10999")
        strangers = [_connect(second) for _ in range(3)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
        strangers[1].sendall(b'{"token": "guessed", "rank": 1, "host": "x"}\n')
        asked, _ = taken.accept()  # rank 1 tries the other program first
        asked.sendall(b"220 mail.example ESMTP\n")
        answers = finish(ranks)
    assert statuses(answers) == [0, 0], said(answers)
    assert [answer.out for answer in answers] == ["met\n", "met\n"]


def _connect(port: int) -> socket.socket:
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_two_commands_of_one_job_do_not_meet():
    body = script("print(share(os.environ['SLURM_STEP_ID'])); share(time.sleep(0.5))")
    one, other = start(body, 2, SLURM_STEP_ID="3"), start(body, 2, SLURM_STEP_ID="4")
    assert [answer.out for answer in finish(one)] == ["3\n", "3\n"]
    assert [answer.out for answer in finish(other)] == ["4\n", "4\n"]


def test_ranks_that_are_out_of_step_say_so():
    answers = srun(script("gather(0) if rank() else share(0)"), 2)
    assert statuses(answers) == [1, 1]
    assert "is at share 1 where rank 1 is at gather 1" in said(answers)


def test_alone_a_value_is_itself():
    value = object()
    assert peers.share(value) is value
    assert peers.gather(value) == [value]
    with peers.together():
        peers.agree("configuration", {"a": 1})
