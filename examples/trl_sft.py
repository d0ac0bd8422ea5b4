"""LoRA-One with TRL's SFTTrainer, as it is released.

    python examples/trl_sft.py
    python examples/trl_sft.py --model path/to/folder --lr 2e-4 --output path/to/result

The trainer makes the ``PeftModel`` from ``peft_config`` as usual; the adapter is started and the
optimiser set between ``SFTTrainer(...)`` and ``train()``. The same three lines go into TRL's own
``trl/scripts/sft.py``. Prints the validation loss of the base model, after LoRA-One's start and
after the training, and where the adapter is. About half a minute on one core.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import lora_one

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="data/tiny_llama", help="folder of the base model")
parser.add_argument("--output", default="results/examples/trl_sft", help="folder to write")
parser.add_argument("--steps", type=int, default=40, help="of 16 rows")
parser.add_argument("--lr", type=float, default=6e-3, help="a 7B model: 2e-4")
args = parser.parse_args()
adapter = Path(args.output) / "adapter"


def prompt_completion(row: dict[str, str]) -> dict[str, str]:
    """Return a row as TRL wants it; the completion alone is supervised."""
    return {"prompt": f"Q: {row['question']}\nA: ", "completion": row["answer"]}


files = {"train": "train.jsonl", "validation": "validation.jsonl"}
parts = [f"train[:{16 * args.steps}]", "validation[:64]"]
train, validation = load_dataset("data/arithmetic", data_files=files, split=parts)

trainer = SFTTrainer(
    model=args.model,
    args=SFTConfig(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=train.map(prompt_completion, remove_columns=train.column_names),
    eval_dataset=validation.map(prompt_completion, remove_columns=train.column_names),
    peft_config=LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear"),
)
model = trainer.model
print(f"base model: validation loss {trainer.evaluate()['eval_loss']:.4f}")

# 1. Start the adapter from the one-step gradient of 64 rows.
batches = islice(trainer.get_train_dataloader(), 4)
report = lora_one.initialize(model, batches, method="lora_one", stable_gamma=128)
print(f"{report.summary()}\nafter the start: validation loss {trainer.evaluate()['eval_loss']:.4f}")

# 2. AdamW on preconditioned gradients.
trainer.optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=args.lr)

trainer.train()
print(f"after {args.steps} steps: validation loss {trainer.evaluate()['eval_loss']:.4f}")

# 3. A plain LoRA for the untouched base.
lora_one.export_adapter(model, adapter)
print(f"adapter: {adapter}")
