"""LoRA-One in a plain PyTorch loop: three lines around the training that is there already.

    python examples/plain_loop.py
    python examples/plain_loop.py --model path/to/folder --lr 2e-4 --output path/to/result

Prints the validation loss of the base model, after LoRA-One's start and after the training, and
where the adapter is. About half a minute on one core.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import lora_one

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="data/tiny_llama", help="folder of the base model")
parser.add_argument("--output", default="results/examples/plain_loop", help="folder to write")
parser.add_argument("--steps", type=int, default=40, help="of 16 rows")
parser.add_argument("--lr", type=float, default=6e-3, help="a 7B model: 2e-4")
args = parser.parse_args()
adapter = Path(args.output) / "adapter"

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
base = AutoModelForCausalLM.from_pretrained(args.model).to(device)
config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear")
model = get_peft_model(base, config)


def encode(line: str) -> dict[str, list[int]]:
    """Return the tokens of question and answer; the answer alone is supervised."""
    row = json.loads(line)
    question = tokenizer(f"Q: {row['question']}\nA: ")["input_ids"]
    answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


def batches(name: str, rows: int, shuffle: bool = False) -> DataLoader:
    """Return the first rows of a file, 16 at a time."""
    with Path("data/arithmetic", name).open() as file:
        encoded = [encode(line) for line in islice(file, rows)]
    collate = DataCollatorForSeq2Seq(tokenizer)
    return DataLoader(encoded, batch_size=16, shuffle=shuffle, collate_fn=collate)


@torch.no_grad()
def validation_loss() -> float:
    """Return the mean over the batches."""
    model.eval()
    losses = [model(**batch.to(device)).loss.item() for batch in validation]
    model.train()
    return sum(losses) / len(losses)


train = batches("train.jsonl", 16 * args.steps, shuffle=True)
validation = batches("validation.jsonl", 64)
print(f"base model: validation loss {validation_loss():.4f}")

# 1. Start the adapter from the one-step gradient of 64 rows.
report = lora_one.initialize(model, islice(train, 4), method="lora_one", stable_gamma=128)
print(f"{report.summary()}\nafter the start: validation loss {validation_loss():.4f}")

# 2. AdamW on preconditioned gradients.
optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=args.lr)

for batch in islice(train, args.steps):
    model(**batch.to(device)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"after {args.steps} steps: validation loss {validation_loss():.4f}")

# 3. A plain LoRA for the untouched base.
lora_one.export_adapter(model, adapter)
print(f"adapter: {adapter}")
