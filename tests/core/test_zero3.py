"""On a base whose weights DeepSpeed ZeRO-3 has cut up, two ranks see what one process sees."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_one
from lora_one.layers import adapted_layers

from .tiny import adapted, batches_for, tiny_llama

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

WORKER = Path(__file__).with_name("zero3_worker.py")
ROWS = (2, 3)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    file = tmp_path_factory.mktemp("zero3") / "results.pt"
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, WORKER, file], env={**os.environ, **accelerator}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.slow
def test_gradients_equal_one_process(sharded):
    expected = lora_one.estimate_gradients(
        tiny_llama(), batches_for(rows=ROWS), target_modules=["q_proj", "v_proj", "down_proj"]
    )
    assert sharded["gradients"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(sharded["gradients"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_starts_equal_one_process(sharded):
    model = adapted(tiny_llama())
    lora_one.initialize(model, batches_for(rows=ROWS), method="lora_one")
    for layer in adapted_layers(model):
        product = (layer.B @ layer.A).detach()
        error = (sharded["products"][layer.name] - product).norm() / product.norm()
        assert error < 1e-4
