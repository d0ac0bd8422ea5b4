"""Generate a reply to every example, score it, and summarise."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_one.errors import InputError
from lora_one.evaluation.batching import BatchSize
from lora_one.evaluation.engines import Decoding, Engine, TransformersEngine
from lora_one.evaluation.finite import require_numbers
from lora_one.evaluation.generation import Reply
from lora_one.evaluation.sampling import Sampling
from lora_one.tasks.base import Example, Task, Verdict
from lora_one.tasks.encoding import Architecture

CHOICE = "choice"  # the scorer that compares probabilities instead of reading the reply

Row = dict[str, Any]
Key = tuple[str, int]
OnRows = Callable[[Sequence[Row]], None]


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one evaluation and every scored row.

    Attributes:
        metrics: What ``task.summarise`` gives (``n``, ``accuracy``, ``unparsed``, and each per
            scorer), and ``truncated`` (fraction of replies ended by length), ``reply_tokens``
            (mean), ``seconds`` (generation and scoring), ``answers_per_second``.
        rows: JSON-ready dicts, the lines of ``predictions.jsonl``, in the order of the examples
            and their samples: ``row_id``, ``sample`` (from 0), ``prompt`` (where a head reads them,
            ``texts`` instead), ``reply`` (raw),
            ``reference``, ``scores`` (per scorer ``parsed`` and ``correct``), ``stop_reason``,
            ``tokens`` and, where the example has choices, ``choice_log_probabilities``.
    """

    metrics: dict[str, float]
    rows: list[Row]


@dataclass(frozen=True)
class Job:
    """One reply to make."""

    example: Example
    sample: int

    @property
    def key(self) -> Key:
        """What tells this reply from all others of an evaluation."""
        return self.example.row_id, self.sample


def row_key(row: Mapping[str, Any]) -> Key:
    """Return the key of the job that a row is the answer to."""
    return row["row_id"], row["sample"]


def plan_jobs(examples: Sequence[Example], samples: int = 1) -> list[Job]:
    """List the replies to make, sample after sample of each example.

    Raises:
        InputError: There is no example, or two have the same row id.
    """
    if not examples:
        raise InputError("there is no example to evaluate")
    if len({example.row_id for example in examples}) < len(examples):
        raise InputError("two test rows have the same row id: they could not be told apart")
    return [Job(example, sample) for example in examples for sample in range(samples)]


def answer(
    engine: Engine,
    task: Task,
    jobs: Sequence[Job],
    decoding: Decoding,
    *,
    score: bool = True,
    on_rows: OnRows | None = None,
) -> list[Row]:
    """Make, and score, the rows of some jobs.

    Args:
        engine: Answers the prompts.
        task: Judges the replies.
        jobs: What to answer.
        decoding: How.
        score: False leaves ``scores`` empty; nothing that a model wrote is then judged.
        on_rows: Called with the rows of every batch, in the order in which they are made.

    Returns:
        One row a job, in order.

    Raises:
        NonFiniteError: The model's logits, or its probabilities of choices, are NaN.
    """
    rows: dict[int, Row] = {}
    compared: dict[str, list[float]] = {}

    def compare(examples: Sequence[Example]) -> None:
        todo = {e.row_id: e for e in examples if e.choices and e.row_id not in compared}
        if todo:
            compared.update(zip(todo, engine.compare(list(todo.values())), strict=True))
        for row_id in todo:
            require_numbers(compared[row_id], row_id)

    def take(places: Sequence[int], replies: Sequence[Reply]) -> None:
        examples = [jobs[place].example for place in places]
        compare(examples)
        verdicts: Sequence[dict[str, Verdict]] = [{} for _ in places]
        if score:
            verdicts = task.judge([reply.text for reply in replies], examples)
        made = []
        for place, reply, scores in zip(places, replies, verdicts, strict=True):
            row = _row(jobs[place], reply, dict(scores), compared, score, task)
            made.append(_as_read(row, jobs[place].example) if engine.reads_texts else row)
            rows[place] = made[-1]
        if on_rows is not None:
            on_rows(made)

    engine.reply(
        [job.example for job in jobs],
        # Seeds of drawn replies: another separator would make other draws.
        [f"{job.example.row_id}\x1f{job.sample}" for job in jobs],
        decoding,
        take,
    )
    return [rows[place] for place in range(len(jobs))]


def _row(
    job: Job,
    reply: Reply,
    scores: dict[str, Verdict],
    compared: Mapping[str, list[float]],
    score: bool,
    task: Task,
) -> Row:
    example = job.example
    row: Row = {
        "row_id": example.row_id,
        "sample": job.sample,
        "prompt": example.prompt,
        "reply": reply.text,
        "reference": example.reference,
        "scores": scores,
        "stop_reason": reply.stop_reason,
        "tokens": reply.tokens,
    }
    if example.choices:
        row["choice_log_probabilities"] = compared[example.row_id]
    if score and CHOICE in task.scorers:
        scores[CHOICE] = choice_verdict(example, compared.get(example.row_id, []))
    return row


def _as_read(row: Row, example: Example) -> Row:
    """Show the texts that a head has read in the place of the prompt that it has not."""
    shown = {("texts" if key == "prompt" else key): value for key, value in row.items()}
    return shown | {"texts": list(example.texts)}


def choice_verdict(example: Example, log_probabilities: Sequence[float]) -> Verdict:
    """Judge by the most probable choice; none where the choices could not be compared.

    Raises:
        NonFiniteError: There is no most probable one, since a probability is NaN.
    """
    require_numbers(log_probabilities, example.row_id)
    if not log_probabilities:
        return {"parsed": None, "correct": False}
    best = max(range(len(log_probabilities)), key=log_probabilities.__getitem__)
    return {"parsed": example.choices[best], "correct": example.choices[best] == example.target}


def judge_again(task: Task, rows: Sequence[Row], examples: Mapping[str, Example]) -> list[Row]:
    """Return rows of an earlier attempt with the verdicts of the present scorers.

    Args:
        task: Judges the replies.
        rows: Replies that were made with the present weights and settings.
        examples: By row id, what the rows are replies to.
    """
    asked = [examples[row["row_id"]] for row in rows]
    verdicts = task.judge([row["reply"] for row in rows], asked)
    judged = []
    for row, example, given in zip(rows, asked, verdicts, strict=True):
        scores = dict(given)
        if CHOICE in task.scorers:
            scores[CHOICE] = choice_verdict(example, row.get("choice_log_probabilities", []))
        judged.append({**row, "reference": example.reference, "scores": scores})
    return judged


def summarise(task: Task, rows: Sequence[Row], *, score: bool = True) -> dict[str, float]:
    """Turn all rows of an evaluation into its metrics but for the time it took."""
    return {
        **(task.summarise(rows) if score else {"n": len(rows)}),
        "truncated": sum(row["stop_reason"] == "length" for row in rows) / len(rows),
        "reply_tokens": sum(row["tokens"] for row in rows) / len(rows),
    }


def evaluate_task(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    architecture: Architecture,
    batch_size: BatchSize,
    max_new_tokens: int,
    samples: int = 1,
    sampling: Sampling | None = None,
    on_rows: OnRows | None = None,
) -> EvaluationResult:
    """Evaluate a model on examples of a task.

    Args:
        model: Model or ``PeftModel``; left in the mode it came in.
        tokenizer: Its tokenizer.
        task: Gives the stop strings, the verdicts and the metrics.
        examples: From ``task.load``.
        architecture: ``causal`` or ``seq2seq``.
        batch_size: Prompts decoded together; ``auto``: as many as fit.
        max_new_tokens: Longest reply.
        samples: Replies to every prompt.
        sampling: How they are drawn; None decodes greedily.
        on_rows: Called with the rows of every batch.

    Raises:
        InputError: There is no example, or several samples are asked for without sampling.
    """
    if samples > 1 and sampling is None:
        raise InputError(f"samples={samples} greedy replies would be all the same: give sampling=")
    start = time.perf_counter()
    engine = TransformersEngine(model, tokenizer, architecture, batch_size)
    decoding = Decoding(max_new_tokens, tuple(task.stop_strings), samples, sampling)
    jobs = plan_jobs(examples, samples)
    rows = answer(engine, task, jobs, decoding, on_rows=on_rows)
    seconds = time.perf_counter() - start
    timing = {"seconds": seconds, "answers_per_second": len(rows) / seconds}
    return EvaluationResult(summarise(task, rows) | timing, rows)
