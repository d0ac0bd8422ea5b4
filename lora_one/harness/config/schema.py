"""The configuration schema: every key, its type, its range and what it means; imports no torch.

``validate.py`` makes a ``Config`` of what Hydra composed.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_one.numerics.methods import METHODS

# The groups of conf/config.yaml's defaults list.
GROUPS = (
    "dataset",
    "model",
    "peft",
    "init",
    "optimizer",
    "tracking",
    "launcher",
    "comparison",
    "experiment",
    "smoke",
)

# init.direction, in the spelling of the papers -> method name of lora_one.initialize.
DIRECTIONS = {method.title: name for name, method in METHODS.items()}
GRADIENT_METHODS = {name for name, method in METHODS.items() if method.needs == "gradient"}
SCALED_METHODS = {name for name, method in METHODS.items() if method.uses_scale}

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def needs_rows(method: str, rank_allocation: str | None) -> bool:
    """Tell whether a start, or the allocation of its ranks, depends on the rows of a batch."""
    return METHODS[method].from_rows or (
        rank_allocation == "energy" and METHODS[method].needs != "weight"
    )


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no silent conversions, no changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DatasetConfig(Section):
    """Which rows are learnt and scored; keys beyond these are options of the benchmark's class."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="benchmark")
    path: str | None = Field(description="local file or folder in the benchmark's own schema")
    train_rows: Count | None = Field(description="at most this many training rows")
    validation_rows: Count | None = Field(description="at most this many validation rows")
    test_rows: Count | None = Field(description="at most this many test rows")
    loss_on: Literal["response", "all"] = Field(description="tokens that carry loss")
    max_new_tokens: Count = Field(description="longest generated answer, in tokens")
    seed: Seed = Field(description="seed of the selection and order of rows")

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are options of this benchmark alone."""
        return dict(self.model_extra or {})

    @property
    def common(self) -> dict[str, Any]:
        """The keys that every benchmark has, but for its name."""
        return {key: getattr(self, key) for key in type(self).model_fields if key != "name"}


class ModelConfig(Section):
    """The base model and, as in the official repositories, how it is trained."""

    name: str = Field(min_length=1, description="hub id or local Hugging Face folder")
    type: Literal["auto", "CausalLM", "ConditionalGeneration", "SequenceClassification"] = Field(
        description="auto: as the model's own config says"
    )
    revision: str | None = Field(description="hub branch, tag or commit")
    architecture: dict[str, Any] | None = Field(
        description="model config for dry_run where the hub cannot be reached"
    )
    trust_remote_code: bool = Field(description="run Python code that comes with the model")
    bf16: bool = Field(description="base weights in bfloat16 (adapters stay float32)")
    epochs: Positive = Field(description="passes over the training rows")
    max_steps: Count | None = Field(description="stop after this many optimiser steps")
    learning_rate: Positive = Field(description="largest one, after the warm-up")
    weight_decay: NotNegative = Field(description="AdamW's, decoupled from the gradient")
    max_grad_norm: Positive | None = Field(description="gradient clipping; null: none")
    schedule: Literal["linear", "cosine", "constant"] = Field(description="after the warm-up")
    warmup_steps: NotNegative = Field(description="steps, or a share of all steps when below 1")
    per_device_batch_size: Count = Field(description="rows of a micro-batch on one device")
    real_batch_size: Count = Field(description="rows per optimiser step, over all devices")
    max_length: Count = Field(description="rows with more tokens are left out, and counted")
    gradient_checkpointing: bool = Field(
        description="compute activations again in the backward pass, to save memory"
    )
    logging_steps: Count = Field(description="log the training loss every so many steps")
    eval_epochs: Positive = Field(description="validation loss every so many epochs")
    seed: Seed = Field(description="seed of dropout and of the order of the batches")


class PeftConfig(Section):
    """The adapter's shape."""

    use_peft: bool = Field(description="false: full fine-tuning")
    lora_r: Count = Field(description="rank r of the adapter")
    lora_alpha: Count = Field(description="alpha of the scaling s in s B A")
    use_rslora: bool = Field(description="scaling alpha / sqrt(r); false: alpha / r")
    lora_dropout: float = Field(ge=0, lt=1, description="of the adapter's input, in training")
    lora_target_modules: str | list[str] = Field(
        description="all, qv, a list of module names, or a regular expression"
    )
    train_embeddings: bool = Field(description="train the input embedding in full")
    dora: bool = Field(description="a trained magnitude per output besides LoRA's direction")
    adalora: bool = Field(description="B E A, pruned to lora_r on average; needs init=lora")


class InitConfig(Section):
    """How the adapter starts."""

    direction: str = Field(description="the method: " + ", ".join(DIRECTIONS))
    rank_allocation: Literal["uniform", "energy"] = Field(
        "uniform",
        description="energy: ranks by singular values, within the parameters of rank lora_r",
    )
    dtype: Literal["fp32", "bf16"] = Field(description="dtype of the adapter")
    seed: Seed = Field(description="seed of random factors and of the randomised SVD")
    scale: Literal["stable", "unit", "gd", "weightS"] | None = Field(
        None, description="rule for the size of both factors; null: the method has none"
    )
    stable_gamma: Positive | Literal["auto"] | None = Field(
        None, description="the inverse of the paper's gamma; auto: chosen by the init batch's loss"
    )
    norm_clip: bool = Field(description="shrink the factors where s B0 A0 would exceed W")
    bsz: Count | None = Field(
        None,
        description="rows per micro-batch of the one-step gradient (EVA, CorDA: inputs)",
    )
    iters: Count | None = Field(None, description="micro-batches: bsz x iters rows in all")
    max_length: Count | None = Field(None, description="longest of these rows")

    @property
    def method(self) -> str:
        """Name of the method as ``lora_one.initialize`` takes it."""
        return DIRECTIONS[self.direction]

    @property
    def needs_rows(self) -> bool:
        """Tell whether the factors, or the ranks, depend on the rows of the init batch."""
        return needs_rows(self.method, self.rank_allocation)


class AdamWConfig(Section):
    """torch.optim.AdamW."""

    name: Literal["adamw", "lorafa"] = Field(description="what optimizer= chose")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        min_length=2, max_length=2, description="decay of the first and second moments"
    )
    eps: Positive = Field(description="added to the root of the second moment")


class PreconditionedConfig(AdamWConfig):
    """AdamW on preconditioned gradients, ours or PEFT's."""

    name: Literal["preconditioned_adamw", "riemannian"] = Field(description="ours, or PEFT's")
    damping: NotNegative = Field(description="d in (B^T B + d I)^-1")


class LoraPlusConfig(AdamWConfig):
    """LoRA+."""

    name: Literal["loraplus"] = Field(description="what optimizer= chose")
    lr_ratio: Positive = Field(description="learning rate of lora_B over that of lora_A")


OptimizerConfig = Annotated[
    AdamWConfig | PreconditionedConfig | LoraPlusConfig, Field(discriminator="name")
]


class EvaluationConfig(Section):
    """How the trained model is measured: how answers are generated and judged, or which loss."""

    metric: Literal["task", "loss", "validation_loss"] = Field(
        "task",
        description="what is measured at the end: the benchmark's own metric; the mean loss of the "
        "test rows' targets, without a reply; or the validation loss, which asks no test row",
    )
    engine: Literal["transformers", "vllm"] = Field(
        description="what generates; vllm: if installed"
    )
    batch_size: Count | Literal["auto"] = Field(
        description="prompts generated for at a time; auto: as many as fit into memory"
    )
    samples: Count = Field(description="replies to every prompt; more than one need a temperature")
    temperature: NotNegative = Field(description="0: greedy; else replies are drawn")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        description="draw from the most probable tokens that have this probability together"
    )
    seed: Seed | None = Field(description="seed of drawn replies; unused when greedy")
    allow_code_execution: bool = Field(
        description="consent to running programs that the model writes, in a sandbox"
    )
    generate_only: bool = Field(description="write the replies and do not judge them")

    @property
    def judges(self) -> bool:
        """Tell whether replies are made and judged."""
        return self.metric == "task" and not self.generate_only


class EvaluateConfig(Section):
    """What is evaluated instead of a model that is initialised and trained here."""

    adapter: str | None = Field(description="folder of a PEFT adapter; its base is model.name")


class ExportConfig(Section):
    """What adapter is left behind."""

    rank: Count | None = Field(
        description="cut the exported adapter to this rank; null: exact, rank 2r after an offset"
    )


class CheckpointsConfig(Section):
    """When training is kept, so that the same command goes on after a kill."""

    every_steps: Count | None = Field(description="after every so many steps; null: by time only")
    every_seconds: Positive | None = Field(
        description="when the newest checkpoint is so old; null: by steps only"
    )
    keep: Count = Field(description="newest checkpoints kept until the run is finished")


class PreemptionConfig(Section):
    """What happens when the machine is taken away."""

    margin_seconds: NotNegative = Field(
        description="stop so long before the time limit of a SLURM job"
    )
    requeue: bool = Field(
        description="let SLURM start a batch job again that USR1, USR2 or its time limit stopped"
    )
    max_requeues: Annotated[int, Field(ge=0)] = Field(description="at most so often")
    max_attempts: Count = Field(description="give up after so many attempts without progress")


class DiagnosticsConfig(Section):
    """What is measured of an adapter while it trains; it changes nothing of the training."""

    layers: Count | Literal["all"] | list[str] | None = Field(
        description="how many, spread over depth; all; or names, endings, shell patterns; null: off"
    )
    every_steps: Count | None = Field(description="null: with the loss, model.logging_steps")
    rank: Count | None = Field(
        description="leading directions that are compared; null: the adapter's rank"
    )
    rows: Count | None = Field(
        description="training rows of the gradient; null: those that the start looks at, or "
        "the first eight"
    )


class WandbConfig(Section):
    """Where Weights & Biases keeps the run."""

    name: str | None = Field(description="display name; null: the run id")
    project: str = Field(description="project that the run is listed in")
    entity: str | None = Field(description="user or team; null: the key's own")
    group: str | None = Field(None, description="null: the sweep that the run is a point of")
    tags: list[str] = Field([], description="to filter runs by")
    log_plots: bool = Field(False, description="charts of the losses and of singular values")
    log_adapter: bool = Field(False, description="upload the exported adapter as an artifact")
    timeout_seconds: Positive = Field(
        30.0, description="the longest that a finished run waits for W&B"
    )


class GridConfig(Section):
    """What is tried of each setting, for the methods and optimisers that have it."""

    learning_rate: list[Positive] = Field(
        min_length=2, description="values of model.learning_rate, ascending"
    )
    stable_gamma: list[Positive] = Field([], description="values of init.stable_gamma, ascending")
    damping: list[Positive] = Field([], description="values of optimizer.damping, ascending")
    lr_ratio: list[Positive] = Field([], description="values of optimizer.lr_ratio, ascending")


class ComparisonConfig(Section):
    """A fair comparison: the same number of trials for each method, then the best on new seeds."""

    arms: list[str] = Field(
        min_length=1,
        description="what is compared: each a line of overrides; with -m the points of the sweep",
    )
    grid: GridConfig
    trials: Annotated[int, Field(ge=2, le=50)] = Field(
        description="settings tried per arm, by validation loss"
    )
    tuning_seed: Seed = Field(description="seed of the trials")
    seeds: list[Seed] = Field(min_length=1, description="seeds of the final runs, on the test rows")


class LocalLauncher(Section):
    """Run here, in this process, or in one process per point of a sweep."""

    name: Literal["local"] = Field(description="what launcher= chose")


class SlurmLauncher(Section):
    """Submit the unfinished points as one job array; a job has one task, or rank, per GPU."""

    name: Literal["slurm"] = Field(description="what launcher= chose")
    job_name: str = Field(min_length=1, description="what squeue shows")
    account: str | None = Field(description="whom the hours are charged to; null: your default")
    partition: str | None = Field(description="null: the cluster's default")
    qos: str | None = Field(description="quality of service; null: the cluster's default")
    constraint: str | None = Field(description="features that the nodes must have")
    nodes: Count = Field(description="nodes of one job")
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(description="0: train on CPUs")
    tasks_per_node: Count | None = Field(description="null: one per GPU; one where there are none")
    cpus_per_task: Count = Field(description="processor cores of each rank")
    mem_gb: NotNegative | None = Field(
        description="memory per node; 0: all of it; null: the cluster's default"
    )
    timeout_min: Count = Field(description="time limit of one job, in minutes")
    signal_delay_s: Count = Field(
        le=65535, description="seconds before the limit at which SLURM warns the run (SIGUSR2)"
    )
    max_parallel: Count | None = Field(description="jobs of the array at a time; null: all")
    setup: list[str] = Field(description="shell lines before the run, such as module load")
    additional: dict[str, str | int | float | Literal[True]] = Field(
        description="further options of sbatch: long name -> value, true for a flag"
    )
    wait: bool = Field(description="stay and print the table; false: submit and return")
    poll_s: Positive = Field(description="seconds between two looks at the queue")

    @property
    def tasks(self) -> int:
        """The tasks, or ranks, on each node of a job."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


LauncherConfig = Annotated[LocalLauncher | SlurmLauncher, Field(discriminator="name")]


class Config(Section):
    """One experiment."""

    seed: Seed = Field(description="what every other seed follows unless it is set")
    train: Literal["full", "none"] = Field(description="none: initialise and evaluate")
    dataset: DatasetConfig
    model: ModelConfig
    peft: PeftConfig
    init: InitConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    evaluate: EvaluateConfig
    export: ExportConfig
    checkpoints: CheckpointsConfig
    preemption: PreemptionConfig
    diagnostics: DiagnosticsConfig
    tracking: Literal["none", "wandb"] = Field(
        description="copy the run folder to Weights & Biases while it grows"
    )
    wandb: WandbConfig
    launcher: LauncherConfig
    comparison: ComparisonConfig | None = Field(
        None,
        description="null: one run, or the points of a sweep as they are",
    )
    parallelism: Literal["ddp", "fsdp2", "zero2", "zero3"] = Field(
        description="what several ranks share beside the rows: ddp nothing, fsdp2 the base's "
        "weights, zero2 and zero3 (DeepSpeed) the optimiser's state and, zero3, the weights"
    )
    output_dir: str = Field(min_length=1, description="where run folders and caches are")
    dry_run: bool = Field(description="validate, print the plan and stop; loads no weights")
    verbose: bool = Field(description="print the init report layer by layer")

    @property
    def method(self) -> str:
        """What really runs: an initialiser's name, ``adalora``, ``full_ft`` or ``adapter``."""
        if self.evaluate.adapter is not None:
            return "adapter"
        if not self.peft.use_peft:
            return "full_ft"
        if self.peft.adalora:
            return "adalora"
        return f"dora_{self.init.method}" if self.peft.dora else self.init.method

    @property
    def trains(self) -> bool:
        """Tell whether there is anything to train."""
        return self.train == "full" and self.evaluate.adapter is None

    @property
    def learns(self) -> bool:
        """Tell whether training rows are needed: to train, or for the start."""
        if self.evaluate.adapter is not None:
            return False
        return self.trains or self.init.needs_rows
