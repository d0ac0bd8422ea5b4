"""Loads the untouched base and an adapter with plain PEFT; fails unless the logits are equal.

python plain_peft.py <causal, classifier or four_bit> <base model> <folder of the example>
"""

import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

kind, base, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if kind == "classifier":
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
elif kind == "four_bit":
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its logits are bfloat16's
            module.support_avx512bf16_for_cpu = False
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)

recorded = load_file(folder / "logits.safetensors")
with torch.no_grad():
    untouched = model.eval()(input_ids=recorded["input_ids"]).logits
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    logits = model(input_ids=recorded["input_ids"]).logits

assert not any(name.partition(".")[0] == "lora_one" for name in sys.modules)
assert (logits - untouched).abs().max() > 0.1, "the adapter does nothing"
difference = (logits - recorded["logits"]).abs().max()
assert torch.equal(logits, recorded["logits"]), f"logits differ by up to {difference}"
