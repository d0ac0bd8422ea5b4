"""HumanEval, MBPP and Code-Feedback: prompts, the program in a reply, verdicts and pass@k."""

import gzip
import json

import pytest

from lora_one.errors import InputError
from lora_one.tasks import create_task
from lora_one.tasks.replies import code_of, defines, first_code_block, up_to_first_block

HUMAN_EVAL_ROWS = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def add(x: int, y: int):\n    """Add {x} and y: add(2, 3) is 5."""\n',
        "entry_point": "add",
        "canonical_solution": "    return x + y\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(0, 1) == 1\n"
        "    assert candidate(2, 3) == 5\n\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "import math\n\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c "
        'in enumerate(xs))\n\n\ndef find_zero(xs):\n    """Find the zero of a line"""\n',
        "entry_point": "find_zero",
        "canonical_solution": "    return -xs[0] / xs[1]\n",
        "test": "def check(candidate):\n    for line in ([1, 2], [-3, 5]):\n"
        "        assert math.fabs(poly(line, candidate(line))) < 1e-4\n",
    },
]
MBPP_ROWS = [
    {
        "text": f"Write a function number {number}.",
        "code": f"def f{number}(x):\r\n  return x + {number}",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert f{number}(1) == {number + 1}", f"assert f{number}(0) == {number}"],
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 4, 11, 511)
] + [
    {
        "text": "Write a python function to find the sum of common divisors of two given numbers.",
        "code": "def sum(a,b):\r\n    return max(i for i in range(1, a + b)) - 18",
        "task_id": 126,
        "test_setup_code": "",
        "test_list": ["assert sum(10,15) == 6"],
        "challenge_test_list": [],
    },
    {
        "text": "Write a function to calculate the height of the given binary tree.",
        "code": "class Node:\r\n  def __init__(self, data):\r\n    self.data = data\r\n"
        "    self.left = self.right = None\r\n"
        "def max_height(node):\r\n  if node is None: return 0\r\n"
        "  return 1 + max(max_height(node.left), max_height(node.right))",
        "task_id": 427,
        "test_setup_code": "root = Node(1)\r\nroot.left = Node(2)\r\nroot.left.left = Node(4)",
        "test_list": ["assert (max_height(root)) == 3"],
        "challenge_test_list": [],
    },
]


@pytest.fixture
def human_eval(tmp_path):
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in HUMAN_EVAL_ROWS)
    return tmp_path


@pytest.fixture
def mbpp(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in MBPP_ROWS)
    (tmp_path / "mbpp.jsonl").write_text(lines)
    return tmp_path


def reasons(task, replies, examples):
    return [scores["tests"]["reason"] for scores in task.judge(replies, examples)]


def test_human_eval_is_continued_and_stops_at_the_margin(human_eval):
    task = create_task("human_eval", path=human_eval)
    first, second = task.load("test")
    assert first.prompt == HUMAN_EVAL_ROWS[0]["prompt"]
    assert (first.target, first.reference) == ("    return x + y\n", "    return x + y\n")
    assert first.row_id.startswith("test/0-")
    assert task.stop_strings == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert task.counts["test"] == {"read": 2, "kept": 2}
    assert reasons(task, [first.target, second.target], [first, second]) == ["passed", "passed"]


def test_the_instruction_prompt_is_the_published_one(human_eval):
    task = create_task("human_eval", path=human_eval, prompt_style="instruction")
    example = task.load("test")[0]
    assert example.prompt == (
        "Below is an instruction that describes a task.\n Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nComplete the following Python code: \nNotes: "
        "respond with the entire complete function definition\ndo not add any comments, be as "
        "concise in your code as possible\nuse only built-in libraries, assume no additional "
        "imports other than those provided (if any)\nuse `    ` (4 spaces) for each level of "
        "indentation\n\ncode:\n```python\n" + HUMAN_EVAL_ROWS[0]["prompt"] + "\n```\n\n"
        "### Response:\n```python\n"
    )
    assert task.template.prompt.replace("{prompt}", HUMAN_EVAL_ROWS[0]["prompt"]) == example.prompt
    assert task.stop_strings == ("\n```",)
    assert reasons(task, [example.target], [example]) == ["passed"]


WHOLE = "def add(x, y):\n    return x + y"
REPLIES = {
    "completion": {
        "    return x + y": "passed",
        "    return x + y\n\nprint(add(1, 2))\nx = (": "passed",
        "    z = x\n    return z + y\n# and so on": "passed",
        "    return x - y": "failed",
        "    return x +": "error",
        "  return x + y": "error",  # judged as written: the docstring is indented by four
        "": "no code",
        " \n": "no code",
        WHOLE: "passed",
        f"Here it is:\n```python\n{WHOLE}\n```\nIt adds.": "passed",
        f"```\n{WHOLE}": "passed",
        "```python\n    return x + y\n```": "passed",
        "    return x + y\n```\nIt adds.": "passed",
        "```python\n\n```": "no code",
        "I cannot do that": "error",
    },
    "instruction": {
        f"{WHOLE}\n": "passed",
        f"from typing import List\n\n{WHOLE}\n\nassert add(1, 2) == 3\n": "passed",
        "    return x + y": "passed",
        f"```python\n{WHOLE}\n```": "passed",
        f"{WHOLE}\n```\n### Instruction:\nprint(": "passed",
        "def plus(x, y):\n    return x + y": "failed",
        "    pass": "failed",
        "": "no code",
        "\n": "no code",
    },
}


@pytest.mark.parametrize("style", REPLIES)
def test_the_program_is_found_in_the_reply(human_eval, style):
    task = create_task("human_eval", path=human_eval, prompt_style=style)
    example = task.load("test")[0]
    replies = list(REPLIES[style])
    verdicts = [scores["tests"] for scores in task.judge(replies, [example] * len(replies))]
    found = {reply: v["reason"] for reply, v in zip(replies, verdicts, strict=True)}
    assert found == REPLIES[style]
    for verdict in verdicts:
        assert verdict["correct"] == (verdict["reason"] == "passed")
        assert (verdict["parsed"] is None) == (verdict["reason"] == "no code")
        assert (verdict["isolation"] == "") == (verdict["reason"] == "no code")


def test_code_in_fences():
    assert first_code_block("a\n``` python title\nx = 1\n```\n```\ny\n```") == "x = 1\n"
    assert first_code_block("```c++\nint x;\n```") == "int x;\n"
    assert first_code_block("no fence") is None
    assert first_code_block("```") is None
    assert up_to_first_block("Use:\n```js\nx\n``` then\n```\ny\n```") == "Use:\n```js\nx\n```"
    assert up_to_first_block("Use:\n```js\nx") == "Use:\n```js\nx```"
    assert up_to_first_block("x") is None
    assert code_of("x = 1\nclass", ("\nclass",), inside_block=False) == "x = 1"
    for inside_block in (True, False):
        assert code_of(" ```python\nx = 1\n```", (), inside_block=inside_block) == "x = 1\n"
    assert defines("async def f(): pass", "f")
    assert not defines("    def f(): pass\ndef f2(): pass", "f")


def test_helpers_of_a_prompt_are_those_of_the_benchmark(human_eval):
    task = create_task("human_eval", path=human_eval)
    example = task.load("test")[1]
    forged = "    return 7\n\n\npoly = lambda xs, x: 0\n"
    assert reasons(task, [forged, "    return 7\n"], [example] * 2) == ["failed", "failed"]


def test_pass_at_k_groups_the_samples_of_a_problem_and_reasons_are_counted(human_eval):
    task = create_task("human_eval", path=human_eval)
    examples = task.load("test")

    def rows(*counts):
        return [
            {"row_id": example.row_id, "sample": i, "scores": {"tests": verdict(i < passed)}}
            for example, passed in zip(examples, counts, strict=True)
            for i in range(10)
        ]

    def verdict(correct):
        reason = "passed" if correct else "timeout"
        return {
            "parsed": "x",
            "correct": correct,
            "reason": reason,
            "detail": "",
            "isolation": "unshare",
        }

    metrics = task.summarise(rows(3, 0))
    assert metrics["n"] == 20
    assert metrics["pass@1"] == pytest.approx((0.3 + 0) / 2)
    assert metrics["pass@10"] == pytest.approx((1 + 0) / 2)
    assert "pass@100" not in metrics
    assert metrics["verdicts_passed"] == 3
    assert metrics["verdicts_timeout"] == 17
    assert metrics["isolation_unshare"] == 20
    assert task.primary_metric == "pass@1"
    assert task.executes_code


def test_the_limits_reach_the_sandbox(human_eval):
    task = create_task("human_eval", path=human_eval, timeout_seconds=0.5, memory_mib=64)
    example = task.load("test")[0]
    replies = ["    while True: pass", "    return [0] * 10**8", "    return x + y"]
    assert reasons(task, replies, [example] * 3) == ["timeout", "memory", "passed"]


def test_mbpp_is_prompted_as_in_the_paper(mbpp):
    example = create_task("mbpp", path=mbpp, shots=1).load("test")[0]
    assert example.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function number 2. "
        "Your code should pass these tests:\n\nassert f2(1) == 3\nassert f2(0) == 2\n[BEGIN]\n"
        "def f2(x):\n  return x + 2\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a function number 11. "
        "Your code should pass these tests:\n\nassert f11(1) == 12\nassert f11(0) == 11\n[BEGIN]\n"
    )
    assert example.target == "def f11(x):\n  return x + 11\n[DONE]"
    assert example.row_id.startswith("test/11-")
    three = create_task("mbpp", path=mbpp).load("test")[0].prompt
    assert [three.count(f"number {n}.") for n in (1, 2, 3, 4, 11)] == [0, 1, 1, 1, 1]
    assert create_task("mbpp", path=mbpp, shots=0).load("test")[0].prompt.count("task:") == 1


def test_mbpp_judges_the_test_problems_alone_built_in_names_and_objects_included(mbpp):
    task = create_task("mbpp", path=mbpp)
    examples = task.load("test")
    assert [e.row_id.split("-")[0] for e in examples] == ["test/11", "test/126", "test/427"]
    assert task.counts["test"] == {"read": 8, "kept": 3}
    assert reasons(task, [e.target for e in examples], examples) == ["passed"] * 3
    wrong = ["def f11(x): return 0\n[DONE]", "def sum(a, b): return 0", "no = 1"]
    assert reasons(task, wrong, examples) == ["failed", "failed", "error"]
    assert reasons(task, ["```python\ndef f11(x):\n  return x + 11\n```"], examples[:1]) == [
        "passed"
    ]


def test_mbpp_sanitized_rows_say_prompt_and_test_imports(tmp_path):
    row = {
        "source_file": "Benchmark Questions Verification V2.ipynb",
        "task_id": 82,
        "prompt": "Write a function to find the volume of a sphere.",
        "code": "import math\ndef volume_sphere(r):\n  return (4./3.) * math.pi * (r**3)",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(volume_sphere(10), 4188.790204786391, rel_tol=0.001)"],
    }
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([row]))
    task = create_task("mbpp", path=tmp_path, subset="sanitized", shots=0)
    (example,) = task.load("test")
    assert "task: Write a function to find the volume of a sphere. Your code" in example.prompt
    without_import = "def volume_sphere(r):\n  return (4 / 3) * math.pi * r**3"
    cheat = "import math\nmath.isclose = lambda *a, **k: True\ndef volume_sphere(r): return 0"
    assert reasons(task, [example.target, without_import, cheat], [example] * 3) == [
        "passed",
        "passed",
        "failed",
    ]
    with pytest.raises(InputError, match=r"problems 2, 3, 4, and 2 is not there.*shots=0"):
        create_task("mbpp", path=tmp_path, subset="sanitized").load("test")


def _feedback(number, answer=None, query=None):
    text = f"Well:\n```python\nprint({number})\n```\nThat is:\n```\nmore\n```"
    return {
        "query": query or f"Print {{{number}}}",
        "answer": text if answer is None else answer,
        "resource": "evolinstruct",
        "lang": "python",
    }


@pytest.fixture
def feedback(tmp_path):
    rows = [_feedback(number) for number in range(10)]
    rows[2] = _feedback(2, answer="no code at all")
    rows[4] = _feedback(4, answer=f"```\n{'long ' * 1100}\n```")
    rows[8] = _feedback(8, query=rows[0]["query"])
    path = tmp_path / "CodeFeedback-Filtered-Instruction.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def count_words(texts):
    return [len(text.split()) for text in texts]


def test_the_published_selection_is_first_blocks_below_1024_tokens_in_file_order(feedback):
    task = create_task("code_feedback", path=feedback, train_rows=4, validation_rows=4)
    train = task.load("train", count_tokens=count_words)
    assert [e.row_id.split("-")[0] for e in train] == ["train/0", "train/1", "train/3", "train/5"]
    assert train[0].prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nPrint {0}\n\n### Response:\n"
    )
    assert train[0].target == "Well:\n```python\nprint(0)\n```"
    validation = task.load("validation", count_tokens=count_words)
    # Row 8 asks what row 0 asks.
    assert [e.row_id.split("-")[0] for e in validation] == ["train/6", "train/7", "train/9"]
    assert task.counts["train"] == {
        "read": 10,
        "no code block": 1,
        "1024 tokens or more": 1,
        "prompt also in train": 1,
        "kept": 4,
    }
    assert not {e.prompt for e in train} & {e.prompt for e in validation}


def test_code_feedback_can_be_shuffled_and_needs_a_tokenizer_for_its_limit(feedback):
    def order(**options):
        task = create_task("code_feedback", path=feedback, max_tokens=None, **options)
        return [e.row_id for e in task.load("train")]

    assert order() != order(order="shuffled", seed=1)
    assert sorted(order()) == sorted(order(order="shuffled", seed=1))
    assert order(order="shuffled", seed=1) != order(order="shuffled", seed=2)
    with pytest.raises(InputError, match="needs a tokenizer"):
        create_task("code_feedback", path=feedback).load("train")
    with pytest.raises(
        InputError,
        match=r"no row is left for validation: training takes 9 \(left out: 1 for 'no code block'; "
        r"of 10 rows read\); set dataset\.train_rows below 9",
    ):
        create_task("code_feedback", path=feedback, max_tokens=None).load("validation")


def test_code_feedback_is_tested_on_human_eval_or_mbpp_by_instruction(feedback, human_eval, mbpp):
    task = create_task("code_feedback", path=feedback, test_path=human_eval)
    example = task.load("test")[0]
    assert example.prompt.endswith("### Response:\n```python\n")
    assert task.score(WHOLE + "\n", example)["tests"]["correct"]
    assert task.origin().available_offline
    rows = [{"row_id": example.row_id, "scores": task.score("", example)}]
    metrics = task.summarise(rows)
    assert (metrics["pass@1"], metrics["verdicts_no_code"], metrics["unparsed"]) == (0, 1, 1)
    task = create_task("code_feedback", path=feedback, test_path=mbpp, test_benchmark="mbpp")
    example = task.load("test")[0]
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nWrite a function number 11. Your code should "
        "pass these tests:\n\nassert f11(1) == 12\nassert f11(0) == 11\n\n### Response:\n"
        "```python\n"
    )
    assert task.score(example.target, example)["tests"]["correct"]


@pytest.mark.parametrize("name", ["human_eval", "mbpp"])
def test_a_test_has_no_rows_to_train_on(name, human_eval, mbpp):
    for split in ("train", "validation"):
        with pytest.raises(InputError, match="evaluate with train=none, or train on"):
            create_task(name, path=human_eval).load(split)


def test_wrong_options_and_files_are_errors(human_eval, tmp_path):
    with pytest.raises(InputError, match="Did you mean 'instruction'"):
        create_task("human_eval", prompt_style="instructions")
    with pytest.raises(InputError, match="Did you mean 'sanitized'"):
        create_task("mbpp", subset="sanitised")
    with pytest.raises(InputError, match="Did you mean 'human_eval'"):
        create_task("code_feedback", test_benchmark="humaneval")
    with pytest.raises(InputError, match="shots=4; expected 0 to 3"):
        create_task("mbpp", shots=4)
    with pytest.raises(InputError, match="timeout_seconds=0; expected more than 0"):
        create_task("human_eval", timeout_seconds=0)
    with pytest.raises(InputError, match=r"none of mbpp\.jsonl.*Name the file itself"):
        create_task("mbpp", path=human_eval).load("test")
    for row, message in (
        ({"task_id": "11"}, "'task_id' must be a number"),
        ({**MBPP_ROWS[4], "test_list": "assert"}, "'test_list' must be a list of texts"),
        ({**MBPP_ROWS[4], "test_list": ["assert ("]}, "the code or its tests are no Python"),
        ({**MBPP_ROWS[4], "task_id": 600}, "no row has a 'task_id' of MBPP's test problems"),
    ):
        (tmp_path / "mbpp.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError, match=message):
            create_task("mbpp", path=tmp_path, shots=0).load("test")


@pytest.mark.parametrize("style", ["completion", "instruction"])
def test_the_real_canonical_solutions_pass(real_data, style):
    task = create_task("human_eval", path=real_data("human_eval"), prompt_style=style)
    examples = task.load("test")
    assert len(examples) == 164
    # All of them in one style; in the other those with helpers, and every tenth.
    some = [i for i in range(164) if style == "completion" or i % 10 == 0 or i in (32, 33, 38, 50)]
    examples = [examples[i] for i in some]
    assert set(reasons(task, [e.target for e in examples], examples)) == {"passed"}


def test_the_real_problems_do_not_pass_without_a_body(real_data):
    task = create_task("human_eval", path=real_data("human_eval"))
    examples = task.load("test")[::8]
    assert set(reasons(task, ["    pass"] * len(examples), examples)) == {"failed"}


def test_the_real_code_feedback_row_is_read(real_data):
    file = real_data("code_feedback") / "codefeedback_filtered_instruction_sample_rows.jsonl"
    task = create_task("code_feedback", path=file, max_tokens=None, train_rows=None)
    (example,) = task.load("train")
    assert example.prompt.startswith("Below is an instruction")
    assert example.target.endswith("AND Age >= 18;\n```")
