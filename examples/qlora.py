"""QLoRA with LoRA-One: a 4-bit base, through which the gradient of the start is taken.

    python examples/qlora.py
    python examples/qlora.py --model path/to/folder --lr 2e-4 --output path/to/result

LoRA-One fits a quantised base well: its start is all in the adapter. LoRA-GA, PiSSA and the other
methods that take their start out of the base weight would have to quantise it again, and are
refused on a quantised base. Prints the size of the base, the validation loss of the base model,
after LoRA-One's start and after the training, and where the adapter is. About half a minute on
one core; bitsandbytes runs on CPUs too.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
)

import lora_one

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="data/tiny_llama", help="folder of the base model")
parser.add_argument("--output", default="results/examples/qlora", help="folder to write")
parser.add_argument("--steps", type=int, default=40, help="of 16 rows")
parser.add_argument("--lr", type=float, default=6e-3, help="a 7B model: 2e-4")
args = parser.parse_args()
adapter = Path(args.output) / "adapter"

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
)
base = AutoModelForCausalLM.from_pretrained(
    args.model, quantization_config=four_bit, device_map=device
)
# On CPUs with AVX512-BF16 bitsandbytes repacks a weight for inference when it is first evaluated,
# and no gradient passes through it from then on.
for module in base.modules():
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = False
print(f"base model: {base.get_memory_footprint() / 2**20:.2f} MiB")
# Norms in float32, gradient checkpointing.
base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
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

# 1. Start the adapter from the one-step gradient of 64 rows, through the quantised layers.
report = lora_one.initialize(model, islice(train, 4), method="lora_one", stable_gamma=128)
print(f"{report.summary()}\nafter the start: validation loss {validation_loss():.4f}")

# 2. AdamW on preconditioned gradients.
optimizer = lora_one.create_preconditioned_optimizer(model, torch.optim.AdamW, lr=args.lr)

for batch in islice(train, args.steps):
    model(**batch.to(device)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"after {args.steps} steps: validation loss {validation_loss():.4f}")

# 3. A plain LoRA for the untouched 4-bit base.
lora_one.export_adapter(model, adapter)
print(f"adapter: {adapter}")
