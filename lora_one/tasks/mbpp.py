"""MBPP (Austin et al. 2021, arXiv:2108.07732): 974 small functions, 500 of them for the test."""

from pathlib import Path
from typing import Literal

from lora_one.errors import InputError, nearest
from lora_one.tasks.base import Example, Origin, Template, make_example
from lora_one.tasks.code_benchmark import CodeBenchmark, Problem
from lora_one.tasks.instruction import WITHOUT_INPUT
from lora_one.tasks.replies import code_of, names_defined, names_used
from lora_one.tasks.rows import Row, Rows, hub_cache_holds, read_file, read_hub, what_is_in

HUB_ID = "google-research-datasets/mbpp"
REVISION = "4bb6404fdc6cacfda99d4ac4205087b89d32030c"
CONFIGS = ("full", "sanitized")
STYLES = ("few_shot", "instruction")
TEST_IDS = range(11, 511)
SHOT_IDS = (2, 3, 4)
_FILE_NAMES = {
    "full": ("mbpp.jsonl", "mbpp.jsonl.gz"),
    "sanitized": ("sanitized-mbpp.json", "sanitized-mbpp.jsonl"),
}

# Austin et al., section 4.1 and figure 1; the examples, answered, come before in the same form.
FEW_SHOT = Template(
    prompt=(
        "You are an expert Python programmer, and here is your task: {text} Your code should pass "
        "these tests:\n\n{tests}\n[BEGIN]\n"
    ),
    target="{code}\n[DONE]",
)
# No prompt is published for MBPP after Code-Feedback: the training prompt around the same task,
# with the code block opened as the published HumanEval prompt opens it.
INSTRUCTION = Template(
    prompt=WITHOUT_INPUT.replace(
        "{instruction}", "{text} Your code should pass these tests:\n\n{tests}"
    )
    + "```python\n",
    target="{code}\n```",
)
STOPS = {"few_shot": ("[DONE]",), "instruction": ("\n```",)}


class MBPP(CodeBenchmark):
    r"""MBPP from the hub or a local file in its native schema; a test only.

    Columns of ``full``: ``task_id``, ``text``, ``code``, ``test_list``, ``test_setup_code``
    (``challenge_test_list`` is not used, as in the paper's main results). ``sanitized`` says
    ``prompt`` for the text and ``test_imports`` for the set-up. The test problems have ids 11 to
    510; the three answered examples are problems 2, 3 and 4, as in the paper.

    Args:
        path: ``mbpp.jsonl`` or ``sanitized-mbpp.json``, or their folder; None reads the hub.
        subset: ``full`` (500 test problems) or ``sanitized`` (257).
        shots: Answered examples before each problem, 3 (published) or fewer.
        prompt_style: ``few_shot`` (Austin et al.) or ``instruction``, which has no examples.
        timeout_seconds: Wall time of a program and its tests, and its processor time.
        memory_mib: Memory of a program.
        revision: Commit, tag or branch of the hub dataset; None is the pinned commit.
    """

    name = "mbpp"
    template = FEW_SHOT

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        subset: Literal["full", "sanitized"] = "full",
        shots: Literal[0, 1, 2, 3] = 3,
        prompt_style: Literal["few_shot", "instruction"] = "few_shot",
        timeout_seconds: float = 10.0,
        memory_mib: int = 1024,
        revision: str | None = None,
    ) -> None:
        super().__init__(timeout_seconds=timeout_seconds, memory_mib=memory_mib)
        for key, value, valid in (
            ("subset", subset, CONFIGS),
            ("prompt_style", prompt_style, STYLES),
        ):
            if value not in valid:
                raise InputError(
                    f"dataset.{key}='{value}'; valid: {', '.join(valid)}.{nearest(value, valid)}"
                )
        if shots not in range(len(SHOT_IDS) + 1):
            raise InputError(f"dataset.shots={shots}; expected 0 to {len(SHOT_IDS)}")
        self._path = None if path is None else Path(path)
        self._subset = subset
        self._inside_block = prompt_style == "instruction"
        self._shots = 0 if self._inside_block else shots
        self._revision = revision or REVISION
        self.template = INSTRUCTION if self._inside_block else FEW_SHOT
        self.stop_strings = STOPS[prompt_style]

    def origin(self) -> Origin:
        """Name the file or the hub id."""
        if self._path is not None:
            return Origin("local", str(self._path), self._path.exists())
        needed = ("prompt", "test") if self._shots else ("test",)
        here = [hub_cache_holds(HUB_ID, self._subset, split, self._revision) for split in needed]
        return Origin("hub", HUB_ID, all(here))

    def load_problems(self) -> list[tuple[Example, Problem]]:
        """Read the test problems, in file order."""
        read = self._read("test")
        rows = [row for row in read.rows if _task_id(row) in TEST_IDS]
        if not rows:
            raise InputError(
                f"{self.origin().location}: no row has a 'task_id' of MBPP's test problems, "
                f"{TEST_IDS[0]} to {TEST_IDS[-1]}"
            )
        shown = "".join(self._shown(read))
        self.sources["test"] = read.source
        self.counts["test"] = {"read": len(read.rows), "kept": len(rows)}
        return [self._problem(row, shown) for row in rows]

    def code_in(self, reply: str) -> str | None:
        """Return the code block, or the reply up to ``[DONE]``."""
        return code_of(reply, self.stop_strings, inside_block=self._inside_block)

    def program(self, code: str, problem: Problem) -> str:
        """Return the code after the imports of the sanitized problems."""
        return f"{problem.prompt}{code}"

    def _shown(self, read: Rows) -> list[str]:
        if not self._shots:
            return []
        source = self._read("prompt") if self._path is None else read
        by_id = {_task_id(row): row for row in source.rows}
        missing = [number for number in SHOT_IDS[: self._shots] if number not in by_id]
        if missing:
            raise InputError(
                f"{self.origin().location}: the answered examples are problems "
                f"{', '.join(map(str, SHOT_IDS))}, and {missing[0]} is not there; give the whole "
                "file, or dataset.shots=0"
            )
        examples = [self._texts(by_id[number]) for number in SHOT_IDS[: self._shots]]
        return [f"{prompt}{target}\n\n" for prompt, target in examples]

    def _texts(self, row: Row) -> tuple[str, str]:
        text = row.text("text" if "text" in row.fields else "prompt").strip()
        # Not str.format: tests and code have braces of their own.
        prompt = self.template.prompt.replace("{text}", text)
        prompt = prompt.replace("{tests}", "\n".join(_lines(row, "test_list")))
        return prompt, self.template.target.replace("{code}", _unix(row.text("code")).strip())

    def _problem(self, row: Row, shown: str) -> tuple[Example, Problem]:
        prompt, target = self._texts(row)
        code = _unix(row.text("code"))
        imports = "".join(f"{line}\n" for line in _lines(row, "test_imports", needed=False))
        setup = _unix(str(row.fields.get("test_setup_code") or ""))
        tests = "\n".join([setup, *_lines(row, "test_list")]) + "\n"
        try:
            # A problem may ask for a function with the name of a built-in one, such as "sum".
            names = sorted(names_defined(code) & names_used(tests))
        except SyntaxError as error:
            raise InputError(f"{row.place}: the code or its tests are no Python: {error}") from None
        problem = Problem(
            prompt=imports, entry_point=None, prelude=imports, tests=tests, names=tuple(names)
        )
        return make_example("test", _task_id(row), shown + prompt, target, code), problem

    def _read(self, split: str) -> Rows:
        if self._path is None:
            return read_hub(HUB_ID, self._subset, split, self._revision)
        if not self._path.is_dir():
            return read_file(self._path)
        for name in _FILE_NAMES[self._subset]:
            if (self._path / name).is_file():
                return read_file(self._path / name)
        raise InputError(
            f"{self._path}: none of {', '.join(_FILE_NAMES[self._subset])}; "
            f"{what_is_in(self._path)}. Name the file itself"
        )


def _task_id(row: Row) -> int:
    value = row.fields.get("task_id")
    if not isinstance(value, int):
        raise InputError(f"{row.place}: 'task_id' must be a number, not {value!r}")
    return value


def _lines(row: Row, column: str, *, needed: bool = True) -> list[str]:
    value = row.fields.get(column)
    # A column of lists in a parquet file may come as another sequence.
    lines = list(value) if value is not None and not isinstance(value, str) else []
    if (needed and not lines) or not all(isinstance(line, str) for line in lines):
        raise InputError(f"{row.place}: '{column}' must be a list of texts, not {value!r}")
    return [_unix(line).strip() for line in lines]


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
