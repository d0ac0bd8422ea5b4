"""LoRA-One with TRL's DPOTrainer, started from the gradient of the DPO loss itself.

    python examples/trl_dpo.py
    python examples/trl_dpo.py --model path/to/folder --lr 5e-6 --output path/to/result

A worked answer is preferred to its last line alone. The trainer makes the
``PeftModel`` from ``peft_config``, so that its reference is the base with the adapter switched
off. (Of a ``PeftModel`` that is passed, TRL's reference would be a copy of the start.) Prints the
validation loss (log 2 for the base) and how often the preferred answer wins. About half a minute
on one core.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from torch import Tensor
from trl import DPOConfig, DPOTrainer

import lora_one

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="data/tiny_llama", help="folder of the base model")
parser.add_argument("--output", default="results/examples/trl_dpo", help="folder to write")
parser.add_argument("--steps", type=int, default=20, help="of 8 pairs")
parser.add_argument("--lr", type=float, default=1e-3, help="5e-6 suits a model of billions")
args = parser.parse_args()
adapter = Path(args.output) / "adapter"


def pair(row: dict[str, str]) -> dict[str, str]:
    """Return a prompt, the worked answer and its last line."""
    answer = row["answer"]
    return {
        "prompt": f"Q: {row['question']}\nA: ",
        "chosen": answer,
        "rejected": answer.splitlines()[-1],
    }


files = {"train": "train.jsonl", "validation": "validation.jsonl"}
rows = load_dataset("data/arithmetic", data_files=files)
rows = rows.map(pair, remove_columns=["question", "answer"])

trainer = DPOTrainer(
    model=args.model,
    args=DPOConfig(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=rows["train"].select(range(1024)),
    eval_dataset=rows["validation"].select(range(32)),
    peft_config=LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear"),
)
model = trainer.model


def dpo_gradients(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the DPO loss's gradient at the reference model, times 2 pairs / beta.

    There all margins are 0 and all sigmoids 1/2, which leaves a difference of two likelihoods'
    gradients, ``dL = beta / 2 pairs · sum (d NLL(chosen) - d NLL(rejected))``.
    """
    sides = []
    for half in (0, 1):  # TRL's batch is all chosen rows, then all rejected ones
        side = []
        for batch in batches:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            tensors = {**batch, "labels": labels}
            names = ("input_ids", "attention_mask", "labels")
            side.append({name: tensors[name].chunk(2)[half] for name in names})
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in side)
        means = lora_one.estimate_gradients(model, side)
        sides.append({name: tokens * mean for name, mean in means.items()})
    chosen, rejected = sides
    return {name: chosen[name] - rejected[name] for name in chosen}


def show(when: str) -> None:
    """Print the validation loss and accuracy."""
    metrics = trainer.evaluate()
    loss, accuracy = metrics["eval_loss"], metrics["eval_rewards/accuracies"]
    print(f"{when}: validation loss {loss:.4f}, preferred answer wins {100 * accuracy:.0f} %")


show("base model")

# 1. Start the adapter from the one-step gradient of 64 pairs.
batches = list(islice(trainer.get_train_dataloader(), 8))
report = lora_one.initialize_adapters(
    model, dpo_gradients(batches), method="lora_one", stable_gamma=128
)
print(report.summary())
show("after the start")

# 2. AdamW on preconditioned gradients.
trainer.optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=args.lr)

trainer.train()
show(f"after {args.steps} steps")

# 3. A plain LoRA for the untouched base.
lora_one.export_adapter(model, adapter)
print(f"adapter: {adapter}")
