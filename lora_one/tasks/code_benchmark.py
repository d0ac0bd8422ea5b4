"""What the code benchmarks share: programs are judged by running them, in a sandbox."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lora_one.errors import InputError
from lora_one.evaluation.pass_at_k import mean_pass_at_k
from lora_one.tasks.base import CountTokens, Example, Split, Task, Verdict, check_split
from lora_one.tasks.usable_cores import usable_cores

NO_CODE = "no code"
# Chen et al. report these; a k above the number of replies per problem is left out.
KS = (1, 10, 100)


@dataclass(frozen=True)
class Problem:
    """What the sandbox needs to judge a program; trusted, as it is the benchmark's own.

    Attributes:
        prompt: The beginning of the program, where the benchmark has the model continue it.
        entry_point: The function asked for, or None where its name is in the tests only.
        prelude: Definitions that the tests use.
        tests: Source that runs to its end if the program is right.
        names: What the tests take from the program although Python or the prelude has it.
    """

    prompt: str
    entry_point: str | None
    prelude: str
    tests: str
    names: tuple[str, ...]


class CodeVerdict(Verdict):
    """A verdict with its reason.

    Attributes:
        reason: ``no code``, or one of ``lora_one.evaluation.sandbox.REASONS``.
        detail: The failed test or the error, in one line.
        isolation: The sandbox's level; empty where nothing was run.
    """

    reason: str
    detail: str
    isolation: str


class CodeBenchmark(Task):
    """Problems with tests. Test-only: ``load`` gives rows for the split ``test`` alone.

    Args:
        timeout_seconds: Wall time of a program and its tests, and its processor time.
        memory_mib: Memory of a program.
    """

    scorers = ("tests",)
    primary_metric = "pass@1"
    executes_code = True

    def __init__(self, *, timeout_seconds: float, memory_mib: int) -> None:
        super().__init__()
        for name, value in (("timeout_seconds", timeout_seconds), ("memory_mib", memory_mib)):
            if value <= 0:
                raise InputError(f"dataset.{name}={value}; expected more than 0")
        self._timeout_seconds = timeout_seconds
        self._memory_mib = memory_mib
        self._problems: dict[str, Problem] = {}

    @abstractmethod
    def load_problems(self) -> list[tuple[Example, Problem]]:
        """Read the test rows; fills ``sources`` and ``counts``."""

    @abstractmethod
    def code_in(self, reply: str) -> str | None:
        """Return the code of a reply as the model wrote it, or None where there is none."""

    @abstractmethod
    def program(self, code: str, problem: Problem) -> str:
        """Return the program to run."""

    def load(self, split: Split, *, count_tokens: CountTokens | None = None) -> list[Example]:
        """Read the test rows.

        Raises:
            InputError: As ``Task.load``; and for every other split.
        """
        check_split(split)
        if split != "test":
            raise InputError(
                f"dataset={self.name} has test rows only: evaluate with train=none, or train on "
                f"dataset=code_feedback with dataset.test_benchmark={self.name}"
            )
        pairs = self.load_problems()
        self._problems = {example.row_id: problem for example, problem in pairs}
        return [example for example, _ in pairs]

    def score(self, reply: str, example: Example) -> dict[str, Verdict]:
        """Judge one reply; see ``judge``."""
        return self.judge([reply], [example])[0]

    def judge(
        self, replies: Sequence[str], examples: Sequence[Example]
    ) -> list[dict[str, Verdict]]:
        """Run the programs side by side, one for each core, each in its own sandbox.

        Raises:
            SandboxError: The sandbox failed; that says nothing about a program.
        """
        with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
            return list(pool.map(self._judge_one, replies, examples))

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Add pass@k and the number of verdicts by reason and by the sandbox's isolation.

        ``pass@k`` is the unbiased estimate, averaged over problems, for every k in ``KS`` that all
        problems have replies for. Rows of one problem share their ``row_id``.
        """
        metrics = super().summarise(rows)
        verdicts: dict[str, list[bool]] = {}
        for row in rows:
            verdicts.setdefault(row["row_id"], []).append(row["scores"]["tests"]["correct"])
        counts = [(len(passed), sum(passed)) for passed in verdicts.values()]
        fewest = min(samples for samples, _ in counts)
        metrics |= {f"pass@{k}": mean_pass_at_k(counts, k) for k in KS if k <= fewest}
        scores = [row["scores"]["tests"] for row in rows]
        reasons = Counter(f"verdicts_{score['reason']}".replace(" ", "_") for score in scores)
        levels = Counter(f"isolation_{s['isolation']}" for s in scores if s["isolation"])
        return metrics | dict(sorted(reasons.items())) | dict(sorted(levels.items()))

    def _judge_one(self, reply: str, example: Example) -> dict[str, Verdict]:
        # Not above: a task is made long before, and often without, judging anything.
        from lora_one.evaluation.sandbox import Limits, judge_program

        code = self.code_in(reply)
        if code is None:
            return {"tests": _verdict(None, NO_CODE, "the reply holds no code", "")}
        problem = self._problems[example.row_id]
        limits = Limits(
            cpu_seconds=self._timeout_seconds,
            wall_seconds=self._timeout_seconds,
            memory_bytes=self._memory_mib << 20,
        )
        outcome = judge_program(
            self.program(code, problem),
            problem.tests,
            prelude=problem.prelude,
            names=problem.names,
            limits=limits,
        )
        return {"tests": _verdict(code, outcome.reason, outcome.detail, outcome.isolation)}


def _verdict(code: str | None, reason: str, detail: str, isolation: str) -> CodeVerdict:
    return {
        "parsed": code,
        "correct": reason == "passed",
        "reason": reason,
        "detail": detail,
        "isolation": isolation,
    }
