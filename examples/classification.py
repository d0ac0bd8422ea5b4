"""LoRA-One for a classifier: the adapter is started, the new head is trained beside it.

    python examples/classification.py
    python examples/classification.py --model path/to/folder --lr 2e-4 --output path/to/result

How many steps does a word problem take, one, two or three? ``modules_to_save`` trains the head in
full, by AdamW without the preconditioner, and the export saves it with the adapter. Prints the
validation loss of the base model, after LoRA-One's start and after the training, and the
accuracy. About half a minute on one core.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import lora_one

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="data/tiny_llama", help="folder of the base model")
parser.add_argument("--output", default="results/examples/classification", help="folder to write")
parser.add_argument("--steps", type=int, default=40, help="of 16 rows")
parser.add_argument("--lr", type=float, default=3e-3, help="a 7B model: 2e-4")
args = parser.parse_args()
adapter = Path(args.output) / "adapter"

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=3).to(device)
base.config.pad_token_id = tokenizer.pad_token_id  # a Llama's head reads the last other token
config = LoraConfig(
    task_type="SEQ_CLS",
    r=8,
    lora_alpha=16,
    use_rslora=True,
    target_modules="all-linear",
    modules_to_save=["score"],  # "classifier" in a BERT
)
model = get_peft_model(base, config)


def encode(line: str) -> dict[str, list[int] | int]:
    """Return the question's tokens, and its number of steps less one."""
    row = json.loads(line)
    steps = row["answer"].count("=")
    return {"input_ids": tokenizer(row["question"])["input_ids"], "labels": steps - 1}


def batches(name: str, rows: int, shuffle: bool = False) -> DataLoader:
    """Return the first rows of a file, 16 at a time."""
    with Path("data/arithmetic", name).open() as file:
        encoded = [encode(line) for line in islice(file, rows)]
    collate = DataCollatorWithPadding(tokenizer)
    return DataLoader(encoded, batch_size=16, shuffle=shuffle, collate_fn=collate)


@torch.no_grad()
def show(when: str) -> None:
    """Print the validation loss and accuracy."""
    model.eval()
    losses, right = [], []
    for batch in validation:
        output = model(**batch.to(device))
        losses.append(output.loss)
        right.append(output.logits.argmax(-1) == batch["labels"])
    model.train()
    loss, accuracy = torch.stack(losses).mean(), torch.cat(right).float().mean()
    print(f"{when}: validation loss {loss:.4f}, accuracy {100 * accuracy:.0f} %")


train = batches("train.jsonl", 16 * args.steps, shuffle=True)
validation = batches("validation.jsonl", 96)
show("base model, random head")

# 1. Start the adapter from the one-step gradient of 64 rows.
report = lora_one.initialize(model, islice(train, 4), method="lora_one", stable_gamma=128)
print(report.summary())
show("after the start")

# 2. AdamW on preconditioned gradients; the head's gradient stays as it is.
optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=args.lr)

for batch in islice(train, args.steps):
    model(**batch.to(device)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
show(f"after {args.steps} steps")

# 3. A plain LoRA for the untouched base, with the head.
lora_one.export_adapter(model, adapter)
print(f"adapter: {adapter}")
