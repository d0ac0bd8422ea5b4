"""LoRA-One in an accelerate loop on several processes, which share the gradient of the start.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_two.py
    torchrun --nproc-per-node 2 examples/accelerate_two.py

Both start two processes, with or without GPUs. ``accelerate launch --cpu --num_processes 2``
starts one: for several on CPUs it wants MPI. Prints the validation loss of the base model, after
LoRA-One's start and after the training, and where the adapter is. About half a minute on two
cores.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import lora_one

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="data/tiny_llama", help="folder of the base model")
parser.add_argument("--output", default="results/examples/accelerate_two", help="folder to write")
parser.add_argument("--steps", type=int, default=40, help="of 8 rows on each process")
parser.add_argument("--lr", type=float, default=6e-3, help="a 7B model: 2e-4")
args = parser.parse_args()
adapter = Path(args.output) / "adapter"

set_seed(0)
# Without cpu=True, processes that find no GPU would not join: each would train alone.
accelerator = Accelerator(cpu=not torch.cuda.is_available())
tokenizer = AutoTokenizer.from_pretrained(args.model)
base = AutoModelForCausalLM.from_pretrained(args.model).to(accelerator.device)
config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear")
model = get_peft_model(base, config)


def encode(line: str) -> dict[str, list[int]]:
    """Return the tokens of question and answer; the answer alone is supervised."""
    row = json.loads(line)
    question = tokenizer(f"Q: {row['question']}\nA: ")["input_ids"]
    answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


def batches(name: str, rows: int, shuffle: bool = False) -> DataLoader:
    """Return this process's batches of the first rows of a file."""
    with Path("data/arithmetic", name).open() as file:
        encoded = [encode(line) for line in islice(file, rows)]
    collate = DataCollatorForSeq2Seq(tokenizer)
    return accelerator.prepare(DataLoader(encoded, 8, shuffle=shuffle, collate_fn=collate))


@torch.no_grad()
def validation_loss() -> float:
    """Return the mean over the batches of all processes."""
    model.eval()
    losses = torch.stack([model(**batch).loss for batch in validation])
    model.train()
    return accelerator.gather(losses).mean().item()


train = batches("train.jsonl", 16 * args.steps, shuffle=True)
validation = batches("validation.jsonl", 64)
accelerator.print(f"{accelerator.num_processes} processes on {accelerator.device.type}")
accelerator.print(f"base model: validation loss {validation_loss():.4f}")

# 1. Start the adapter, before DDP wraps the model. Each process passes its own batches, the
#    gradient is that of all.
report = lora_one.initialize(model, islice(train, 4), method="lora_one", stable_gamma=128)
accelerator.print(f"{report.summary()}\nafter the start: validation loss {validation_loss():.4f}")

# 2. AdamW on preconditioned gradients.
optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=args.lr)

model, optimizer = accelerator.prepare(model, optimizer)
for batch in islice(train, args.steps):
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
accelerator.print(f"after {args.steps} steps: validation loss {validation_loss():.4f}")

# 3. A plain LoRA for the untouched base, written by one process.
model = accelerator.unwrap_model(model)
if accelerator.is_main_process:
    lora_one.export_adapter(model, adapter)
accelerator.print(f"adapter: {adapter}")
accelerator.end_training()
