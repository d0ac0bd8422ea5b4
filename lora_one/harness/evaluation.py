"""The evaluation stage: every test row answered once, by whichever rank, also after a kill."""

import gc
import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from tqdm import tqdm

from lora_one.adapters.serving import check_vllm
from lora_one.adapters.stored import read_stored
from lora_one.errors import InputError, NonFiniteError
from lora_one.evaluation.context import context_of
from lora_one.evaluation.engines import Decoding, Engine, TransformersEngine
from lora_one.evaluation.evaluate import (
    EvaluationResult,
    Job,
    Key,
    Row,
    answer,
    judge_again,
    plan_jobs,
    row_key,
    summarise,
)
from lora_one.evaluation.generation import eos_token_ids
from lora_one.evaluation.head import HeadEngine, refuse_sampling
from lora_one.evaluation.journal import Journal, recover
from lora_one.evaluation.loss import mean_token_loss
from lora_one.evaluation.sampling import Sampling
from lora_one.evaluation.vllm_engine import VllmEngine, fitting_rank, require_vllm
from lora_one.harness.config.given_adapter import GivenAdapter
from lora_one.harness.config.schema import Config
from lora_one.harness.console import say, show_progress
from lora_one.harness.data.rows import batches_of
from lora_one.harness.distributed.fsdp import own_pace
from lora_one.harness.distributed.ranks import is_main, rank, world_size
from lora_one.harness.export import expected_rank
from lora_one.harness.models.base import Base, base_dtype
from lora_one.harness.resuming import preemption
from lora_one.tasks import Task
from lora_one.tasks.encoding import encode

if TYPE_CHECKING:
    from lora_one.harness.data.rows import Data
    from lora_one.harness.plan import Plan


def evaluate(
    config: Config, plan: "Plan", model: nn.Module, folder: Path, base_weights: str | None
) -> tuple[EvaluationResult, dict[str, Any]]:
    """Answer and score the test rows, on all ranks; the result is the same on each.

    Replies that an earlier attempt made with the same weights and settings are kept, and only the
    others are made. Kept ones are judged again: the scorer may have changed in between.

    Args:
        config: The run.
        plan: Test rows, task and tokenizer.
        model: The model to evaluate.
        folder: The run folder, where rows are kept as they are made.
        base_weights: Identifies the base model's weights.

    Returns:
        The result, and facts for the record: fingerprint, hash of the replies, how many were there
        already, ranks.
    """
    start = time.perf_counter()
    task, score = plan.data.task, not config.evaluation.generate_only
    decoding = decoding_of(config, task)
    jobs = plan_jobs(plan.data.test, decoding.samples)
    fingerprint, done = None, []
    if is_main():
        fingerprint = fingerprint_of(config, plan, model, decoding, base_weights)
        wanted = {job.key for job in jobs}
        done = [row for row in recover(folder, fingerprint, say) if row_key(row) in wanted]
    fingerprint, done = _from_main((fingerprint, done))
    if done and score:
        examples = {job.example.row_id: job.example for job in jobs}
        done = _gather(judge_again(task, done[rank() :: world_size()], examples))
    recovered = {row_key(row): row for row in done}
    todo = [job for job in jobs if job.key not in recovered]
    if done:
        say(f"eval: {len(done)} of {len(jobs)} replies are there already")
    engine = make_engine(config, plan, model, folder) if todo else None
    share = _share(todo)
    bar = _Progress(task, done, len(share))
    with Journal(folder, rank(), fingerprint) as journal:

        def keep(rows: Sequence[Row]) -> None:
            journal.add(rows)
            bar.add(rows)
            preemption.heed()

        made = []
        with own_pace(model, answers=True) if todo else nullcontext():
            if share:
                made = answer(engine, task, share, decoding, score=score, on_rows=keep)
    bar.close()
    rows = _in_order(jobs, [*done, *_gather(made)])
    seconds = time.perf_counter() - start
    timing = {"seconds": seconds, "answers_per_second": len(todo) / seconds}
    facts = {
        "fingerprint": fingerprint,
        "replies_sha256": _hash_replies(rows),
        "recovered": len(done),
        "ranks": world_size(),
    }
    return EvaluationResult(summarise(task, rows, score=score) | timing, rows), facts


def test_loss(config: Config, plan: "Plan", model: nn.Module) -> dict[str, float]:
    """Mean loss of the test rows' targets, in nats per token (classification: per row).

    Returns:
        ``test_loss``, and ``n``: the rows that it is taken over, those longer than
        ``model.max_length`` being left out.

    Raises:
        NonFiniteError: it is not finite.
    """
    architecture = plan.base.architecture
    encoded = encode(
        plan.data.test,
        plan.tokenizer,
        max_length=config.model.max_length,
        architecture=architecture,
        loss_on=config.dataset.loss_on,
    )
    if encoded.dropped:
        say(
            f"note: test: {encoded.dropped:,} of {len(plan.data.test):,} rows left out, longer "
            f"than model.max_length={config.model.max_length} tokens"
        )
    batches = batches_of(encoded.rows, config.model.per_device_batch_size, plan.collator)
    loss = mean_token_loss(model, batches, architecture).mean
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss of the test rows is {loss}")
    return {"test_loss": loss, "n": len(encoded)}


def decoding_of(config: Config, task: Task) -> Decoding:
    """Translate the ``evaluation`` section."""
    settings = config.evaluation
    sampling = None
    if settings.temperature > 0:
        sampling = Sampling(settings.temperature, settings.top_p, settings.seed)
    return Decoding(
        config.dataset.max_new_tokens, tuple(task.stop_strings), settings.samples, sampling
    )


def check_engine(config: Config, base: Base, data: "Data", given: GivenAdapter | None) -> None:
    """Refuse what vLLM or a classification head cannot do, before anything is loaded.

    Raises:
        InputError: vLLM is not installed, or the run asks it, or a head, for what it cannot do.
    """
    if base.architecture == "classification":
        refuse_sampling(decoding_of(config, data.task))
    if config.evaluation.engine != "vllm":
        return
    instead = "Give evaluation.engine=transformers."
    if base.architecture != "causal":
        raise InputError(f"evaluation.engine=vllm runs causal models only. {instead}")
    if world_size() > 1:
        raise InputError(f"evaluation.engine=vllm runs in one process, not {world_size()} ranks.")
    if any(example.choices for example in data.test):
        raise InputError(
            f"dataset={data.task.name} compares the probabilities of choices, which "
            f"evaluation.engine=vllm does not do here. {instead}"
        )
    require_vllm()
    adapts = config.peft.use_peft or given is not None
    if adapts and base_dtype(config) == torch.float32:
        raise InputError(
            "evaluation.engine=vllm multiplies LoRA factors in 16 bits only, and this model is in "
            "float32. Give model.bf16=true, on a GPU that has bfloat16, or "
            "evaluation.engine=transformers."
        )
    if config.peft.use_peft and given is None:
        fitting_rank(expected_rank(config))
    obstacles = [] if given is None else check_vllm(read_stored(given.path)).obstacles
    if obstacles:
        raise InputError(
            f"evaluate.adapter={given.path} in vLLM: {'; '.join(obstacles)}. {instead}"
        )


def make_engine(config: Config, plan: "Plan", model: nn.Module, folder: Path) -> Engine:
    """Make what ``evaluation.engine`` names, or what reads a classification head."""
    if plan.base.architecture == "classification":
        return HeadEngine(model, plan.tokenizer, plan.data.task, config.evaluation.batch_size)
    if config.evaluation.engine == "transformers":
        return TransformersEngine(
            model, plan.tokenizer, plan.base.architecture, config.evaluation.batch_size
        )
    name, adapter = plan.base.location, folder / "adapter"
    if plan.given is not None:
        adapter = plan.given.path
    elif plan.adapter is None:
        name, adapter = str(folder / "model"), None
    eos = sorted(eos_token_ids(model, plan.tokenizer))
    dtype = str(base_dtype(config)).removeprefix("torch.")
    # vLLM loads a copy of its own and wants the accelerator to itself.
    model.to("cpu")
    gc.collect()  # a Trainer refers to itself, and holds the optimiser's state
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return VllmEngine(
        name,
        plan.tokenizer,
        eos=eos,
        adapter=adapter,
        dtype=dtype,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        context=context_of(plan.base.config, "causal", plan.tokenizer),
    )


def _from_main(value: Any) -> Any:
    """What rank 0 holds, on every rank; so ranks that share no disk agree as well."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def fingerprint_of(
    config: Config, plan: "Plan", model: nn.Module, decoding: Decoding, base_weights: str | None
) -> str:
    """Hash what a reply, or a comparison of choices, depends on: settings and weights.

    Verdicts are no part of it, since replies that are found again are judged again.

    Of a PEFT model the adapter's weights are read, and ``base_weights`` stands for the others.
    """
    if isinstance(model, PeftModel):
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        weights = model.state_dict()
    settings = {
        "decoding": asdict(decoding),
        "engine": config.evaluation.engine,
        "dtype": str(base_dtype(config)),
        "choices": [example.choices for example in plan.data.test],
        "template": asdict(plan.data.task.template),
        "base": base_weights,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        values = tensor.detach().cpu().contiguous().view(-1)
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_replies(rows: Sequence[Row]) -> str:
    """Tell replies apart: the table of runs shows the same ones once."""
    replies = [[row["row_id"], row["sample"], row["reply"]] for row in rows]
    return hashlib.sha256(json.dumps(replies).encode()).hexdigest()


def _share(todo: Sequence[Job]) -> list[Job]:
    """This rank's part: every so many-th, the longest first, so that the parts are equal work."""
    ordered = sorted(todo, key=lambda job: -len(job.example.prompt))
    return ordered[rank() :: world_size()]


def _gather(made: list[Row]) -> list[Row]:
    """Bring the rows of all ranks together."""
    if world_size() == 1:
        return made
    parts: list[list[Row]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, made)
    return [row for part in parts for row in part]


def _in_order(jobs: Sequence[Job], rows: Sequence[Row]) -> list[Row]:
    """Put rows into the order of their jobs, each of which has exactly one."""
    by_key: dict[Key, Row] = {row_key(row): row for row in rows}
    if len(by_key) != len(rows) or by_key.keys() != {job.key for job in jobs}:
        raise RuntimeError(
            f"{len(rows)} rows for {len(jobs)} replies: each has to be made exactly once"
        )
    return [by_key[job.key] for job in jobs]


class _Progress:
    """A bar of this rank's replies, with the accuracy so far."""

    def __init__(self, task: Task, done: Sequence[Row], count: int) -> None:
        self._scorer = task.scorers[0]
        self._seen = self._correct = 0
        self._bar = tqdm(total=count, desc="eval", leave=False, disable=not show_progress())
        self._count(done)

    def add(self, rows: Sequence[Row]) -> None:
        self._count(rows)
        if self._seen:
            self._bar.set_postfix(
                {self._scorer: f"{self._correct / self._seen:.3f}"}, refresh=False
            )
        self._bar.update(len(rows))

    def close(self) -> None:
        self._bar.close()

    def _count(self, rows: Sequence[Row]) -> None:
        verdicts = [row["scores"][self._scorer] for row in rows if row["scores"]]
        self._seen += len(verdicts)
        self._correct += sum(verdict["correct"] for verdict in verdicts)
