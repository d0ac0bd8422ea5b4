"""HumanEval (Chen et al. 2021, arXiv:2107.03374): 164 functions to write, judged by tests."""

from pathlib import Path
from typing import Literal

from lora_one.errors import InputError, nearest
from lora_one.tasks.base import Example, Origin, Template, make_example
from lora_one.tasks.code_benchmark import CodeBenchmark, Problem
from lora_one.tasks.replies import code_of, defines
from lora_one.tasks.rows import Row, Rows, hub_cache_holds, read_file, read_hub, what_is_in

HUB_ID = "openai/openai_humaneval"
HUB_CONFIG = "openai_humaneval"
REVISION = "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"
STYLES = ("completion", "instruction")
_FILE_NAMES = ("HumanEval.jsonl.gz", "HumanEval.jsonl", "test.jsonl", "test.parquet")

# The model continues the source: Chen et al. and every base model's report.
COMPLETION = Template(prompt="{prompt}", target="{canonical_solution}")
# The prompt of the LoRA-GA evaluation, which LoRA-One's follows. Its line break and the blanks
# within the first sentence and after "code:" are theirs.
INSTRUCTION = Template(
    prompt=(
        "Below is an instruction that describes a task.\n Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nComplete the following Python code: \n"
        "Notes: respond with the entire complete function definition\n"
        "do not add any comments, be as concise in your code as possible\n"
        "use only built-in libraries, assume no additional imports other than those provided "
        "(if any)\nuse `    ` (4 spaces) for each level of indentation\n\ncode:\n"
        "```python\n{prompt}\n```\n\n### Response:\n```python\n"
    ),
    target="{prompt}{canonical_solution}```",
)
STOPS = {
    # Section 2.1 of Chen et al.: what begins at the margin is no longer the function.
    "completion": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "instruction": ("\n```",),
}


class HumanEval(CodeBenchmark):
    """HumanEval from the hub or a local file in its native schema; a test only.

    Columns: ``task_id``, ``prompt``, ``entry_point``, ``canonical_solution``, ``test``. A reply is
    put behind its prompt, which brings imports and helpers along; a reply that writes the whole
    function overrides the prompt's unfinished one. What the tests compute with helpers (``poly``,
    ``encode_cyclic``, ``encode_shift``) they compute with the benchmark's.

    The published LoRA-GA evaluation also rewrites the reply before running it (no docstrings, new
    indentation); that is not done here: a program is judged as it was written.

    Args:
        path: ``HumanEval.jsonl.gz``, an unpacked or parquet one, or its folder; None reads the hub.
        prompt_style: ``completion`` (Chen et al.) or ``instruction`` (LoRA-GA, LoRA-One).
        timeout_seconds: Wall time of a program and its tests, and its processor time. Chen et al.
            take 3; more costs nothing where programs end, and less depends on the machine.
        memory_mib: Memory of a program.
        revision: Commit, tag or branch of the hub dataset; None is the pinned commit.
    """

    name = "human_eval"
    template = COMPLETION

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        prompt_style: Literal["completion", "instruction"] = "completion",
        timeout_seconds: float = 10.0,
        memory_mib: int = 1024,
        revision: str | None = None,
    ) -> None:
        super().__init__(timeout_seconds=timeout_seconds, memory_mib=memory_mib)
        if prompt_style not in STYLES:
            raise InputError(
                f"dataset.prompt_style='{prompt_style}'; valid: {', '.join(STYLES)}."
                f"{nearest(prompt_style, STYLES)}"
            )
        self._path = None if path is None else Path(path)
        self._inside_block = prompt_style == "instruction"
        self._revision = revision or REVISION
        self.template = INSTRUCTION if self._inside_block else COMPLETION
        self.stop_strings = STOPS[prompt_style]

    def origin(self) -> Origin:
        """Name the file or the hub id."""
        if self._path is not None:
            return Origin("local", str(self._path), self._path.exists())
        here = hub_cache_holds(HUB_ID, HUB_CONFIG, "test", self._revision)
        return Origin("hub", HUB_ID, here)

    def load_problems(self) -> list[tuple[Example, Problem]]:
        """Read the problems, in file order."""
        read = self._read()
        self.sources["test"] = read.source
        self.counts["test"] = {"read": len(read.rows), "kept": len(read.rows)}
        return [self._problem(row, index) for index, row in enumerate(read.rows)]

    def code_in(self, reply: str) -> str | None:
        """Return the code block, or the raw continuation up to what begins at the margin."""
        return code_of(reply, self.stop_strings, inside_block=self._inside_block)

    def program(self, code: str, problem: Problem) -> str:
        """Put the code behind the prompt, on a line of its own where it is a whole function."""
        whole = problem.entry_point is not None and defines(code, problem.entry_point)
        return f"{problem.prompt}\n{code}" if whole else problem.prompt + code

    def _problem(self, row: Row, index: int) -> tuple[Example, Problem]:
        columns = {
            name: row.text(name) for name in ("prompt", "canonical_solution", "test", "entry_point")
        }
        # Not str.format: the texts are programs, with braces of their own.
        prompt = self.template.prompt.replace("{prompt}", columns["prompt"])
        target = columns["canonical_solution"]
        if self._inside_block:
            target = f"{columns['prompt']}{target}```"
        problem = Problem(
            prompt=columns["prompt"],
            entry_point=columns["entry_point"],
            prelude=columns["prompt"],
            tests=f"{columns['test']}\ncheck({columns['entry_point']})\n",
            names=(columns["entry_point"],),
        )
        solution = columns["canonical_solution"]
        return make_example("test", index, prompt, target, solution), problem

    def _read(self) -> Rows:
        if self._path is None:
            return read_hub(HUB_ID, HUB_CONFIG, "test", self._revision)
        if not self._path.is_dir():
            return read_file(self._path)
        for name in _FILE_NAMES:
            if (self._path / name).is_file():
                return read_file(self._path / name)
        raise InputError(
            f"{self._path}: none of {', '.join(_FILE_NAMES)}; {what_is_in(self._path)}. Name the "
            "file itself"
        )
