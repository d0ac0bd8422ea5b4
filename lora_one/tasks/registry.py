"""The benchmarks by name."""

import inspect
from pathlib import Path
from typing import Any

from lora_one.errors import InputError, nearest
from lora_one.tasks.alpaca import Alpaca
from lora_one.tasks.arithmetic import Arithmetic
from lora_one.tasks.base import Task
from lora_one.tasks.code_feedback import CodeFeedback
from lora_one.tasks.commonsense import Commonsense
from lora_one.tasks.custom import Custom
from lora_one.tasks.glue import GLUE
from lora_one.tasks.gsm8k import GSM8K
from lora_one.tasks.hendrycks_math import HendrycksMath
from lora_one.tasks.human_eval import HumanEval
from lora_one.tasks.mbpp import MBPP
from lora_one.tasks.meta_math import MetaMath
from lora_one.tasks.mmlu import MMLU
from lora_one.tasks.super_glue import SUPER_GLUE
from lora_one.tasks.wizard_lm import WizardLM

_CLASSES: tuple[type[Task], ...] = (
    Alpaca,
    Arithmetic,
    CodeFeedback,
    Commonsense,
    Custom,
    GSM8K,
    HendrycksMath,
    HumanEval,
    MBPP,
    MMLU,
    MetaMath,
    WizardLM,
    *GLUE,
    *SUPER_GLUE,
)
TASKS: dict[str, type[Task]] = {cls.name: cls for cls in _CLASSES}


def create_task(name: str, *, path: str | Path | None = None, **options: Any) -> Task:
    """Create a benchmark by name.

    Args:
        name: A key of ``TASKS``.
        path: Local files instead of the embedded ones or the hub.
        **options: Keyword arguments of the task's class.

    Raises:
        InputError: Unknown name, or an option that this task does not have.
    """
    if name not in TASKS:
        raise InputError(
            f"unknown dataset '{name}'; valid: {', '.join(sorted(TASKS))}.{nearest(name, TASKS)}"
        )
    cls = TASKS[name]
    valid = [option for option in inspect.signature(cls.__init__).parameters if option != "self"]
    for option in options:
        if option not in valid:
            raise InputError(
                f"dataset.{option} is not an option of '{name}'; valid: {', '.join(valid)}."
                f"{nearest(option, valid)}"
            )
    return cls(path=path, **options)
