"""LoRA-One with TRL's DPOTrainer, started from the gradient of the DPO loss itself.

    python examples/trl_dpo.py
    python examples/trl_dpo.py --model path/to/folder --lr 1e-5 --output path/to/result

A worked answer is preferred to its last line alone. The trainer makes the ``PeftModel`` from
``peft_config``, and its reference is then the base with the adapter switched off. (If a
``PeftModel`` is passed, TRL's reference is a copy of the start.) Prints the validation loss, log 2
for the base model, and how often the preferred answer wins: of the base model, after LoRA-One's
start and after the training; and where the adapter is. About half a minute on one core.
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
parser.add_argument("--lr", type=float, default=1e-3, help="less for large models; TRL has 1e-6")
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
parts = [f"train[:{8 * args.steps}]", "validation[:32]"]
train, validation = load_dataset("data/arithmetic", data_files=files, split=parts)

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
    train_dataset=train.map(pair, remove_columns=train.column_names),
    eval_dataset=validation.map(pair, remove_columns=train.column_names),
    peft_config=LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear"),
)
model = trainer.model


def completions(batch: dict[str, Tensor], half: int) -> dict[str, Tensor]:
    """Return the chosen (0) or the rejected (1) rows of TRL's batch, their prompts unsupervised."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    rows = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return {name: tensor.chunk(2)[half] for name, tensor in {**rows, "labels": labels}.items()}


def likelihood_gradients(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the gradients of NLL, the negative log-likelihood summed over all tokens."""
    tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    tokens = trainer.accelerator.reduce(tokens).item()  # of all processes
    means = lora_one.estimate_gradients(model, batches, device="cpu")
    return {name: tokens * mean for name, mean in means.items()}


def dpo_gradients(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the DPO loss's gradients at the reference, but for a factor that LoRA-One ignores.

    There all margins are 0, which leaves ``beta / 2n (dNLL(chosen) - dNLL(rejected))`` of n pairs.
    """
    chosen = likelihood_gradients([completions(batch, 0) for batch in batches])
    rejected = likelihood_gradients([completions(batch, 1) for batch in batches])
    return {name: chosen[name] - rejected[name] for name in chosen}


def show(when: str) -> None:
    """Print the validation loss and accuracy."""
    metrics = trainer.evaluate()
    loss, accuracy = metrics["eval_loss"], metrics["eval_rewards/accuracies"]
    print(f"{when}: validation loss {loss:.4f}, preferred answer wins {100 * accuracy:.0f} %")


show("base model")

# 1. Start the adapter from the one-step gradient of 64 pairs.
batches = list(islice(trainer.get_train_dataloader(), 8))
gradients = dpo_gradients(batches)
report = lora_one.initialize_adapters(model, gradients, method="lora_one", stable_gamma=128)
print(report.summary())
show("after the start")

# 2. AdamW on preconditioned gradients.
trainer.optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=args.lr)

trainer.train()
show(f"after {args.steps} steps")

# 3. A plain LoRA for the untouched base.
lora_one.export_adapter(model, adapter)
print(f"adapter: {adapter}")
