"""LoRA-One with the Trainer of transformers: the optimiser goes in by ``optimizers=``.

    python examples/trainer.py
    python examples/trainer.py --model path/to/folder --lr 2e-4 --output path/to/result

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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

import lora_one

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="data/tiny_llama", help="folder of the base model")
parser.add_argument("--output", default="results/examples/trainer", help="folder to write")
parser.add_argument("--steps", type=int, default=40, help="of 16 rows")
parser.add_argument("--lr", type=float, default=6e-3, help="a 7B model: 2e-4")
args = parser.parse_args()
adapter = Path(args.output) / "adapter"

set_seed(0)
training = TrainingArguments(
    output_dir=args.output,
    max_steps=args.steps,
    per_device_train_batch_size=16,
    lr_scheduler_type="cosine",
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
tokenizer = AutoTokenizer.from_pretrained(args.model)
# On the device before the start: the Trainer would move the model there only later.
base = AutoModelForCausalLM.from_pretrained(args.model).to(training.device)
config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear")
model = get_peft_model(base, config)


def encode(line: str) -> dict[str, list[int]]:
    """Return the tokens of question and answer; the answer alone is supervised."""
    row = json.loads(line)
    question = tokenizer(f"Q: {row['question']}\nA: ")["input_ids"]
    answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


with Path("data/arithmetic/train.jsonl").open() as file:
    train = [encode(line) for line in islice(file, 16 * args.steps)]
with Path("data/arithmetic/validation.jsonl").open() as file:
    validation = [encode(line) for line in islice(file, 64)]
collate = DataCollatorForSeq2Seq(tokenizer)

# 1. Start the adapter from the one-step gradient of 64 rows.
batches = DataLoader(train[:64], batch_size=16, collate_fn=collate)
report = lora_one.initialize(model, batches, method="lora_one", stable_gamma=128)
print(report.summary())

# 2. AdamW on preconditioned gradients. The Trainer's learning rate schedule applies to it, its
#    learning_rate and weight_decay do not.
optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=args.lr)

trainer = Trainer(
    model=model,
    args=training,
    train_dataset=train,
    eval_dataset=validation,
    data_collator=collate,
    optimizers=(optimizer, None),
)
with model.disable_adapter():
    print(f"base model: validation loss {trainer.evaluate()['eval_loss']:.4f}")
print(f"after the start: validation loss {trainer.evaluate()['eval_loss']:.4f}")
trainer.train()
print(f"after {args.steps} steps: validation loss {trainer.evaluate()['eval_loss']:.4f}")

# 3. A plain LoRA for the untouched base.
lora_one.export_adapter(model, adapter)
print(f"adapter: {adapter}")
