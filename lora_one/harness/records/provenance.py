"""Where a result comes from: code, software, hardware."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lora_one
from lora_one.harness.records.source import commit

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "accelerate", "hydra-core")


def provenance() -> dict[str, Any]:
    """Describe this process: git commit, package versions, processor, accelerators, threads."""
    return {
        "git": commit(),
        "python": platform.python_version(),
        "versions": {"lora-one": lora_one.__version__}
        | {name: _version(name) for name in PACKAGES},
        "hardware": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
