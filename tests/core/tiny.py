"""Tiny random models of three architectures, batches for them, and adapters on them."""

import copy

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

VOCABULARY = 61


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


def tiny_llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def tiny_gpt2(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes})).eval()


def tiny_t5(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    config = transformers.T5Config(**{**sizes, **changes})
    return transformers.T5ForConditionalGeneration(config).eval()


def tiny_mixtral():
    """Its experts' weights are parameters of three dimensions, no layers."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


class Endings(nn.Module):
    """The name of a layer, ``proj``, is the end of another's, ``sub.proj``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(16, 16)
        self.sub = nn.ModuleDict({"proj": nn.Linear(16, 16), "other": nn.Linear(16, 16)})

    def forward(self, x):
        return self.sub["other"](torch.tanh(self.sub["proj"](torch.tanh(self.proj(x)))))


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v", "wo"],
}


def batches_for(kind="llama", rows=(3, 2), length=12, seed=1):
    """Micro-batches of different sizes, with padding and a masked prompt in every row."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index, count in enumerate(rows):
        ids = torch.randint(2, VOCABULARY, (count, length), generator=generator)
        labels = ids.clone()
        labels[:, : 3 + index] = -100
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        labels[0, -3:] = -100
        if kind == "t5":
            labels = labels.flip(1)[:, : length // 2].clone()
            labels[0, :2] = 5
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def adapted(model, r=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"), **options):
    """Return a PeftModel over a copy of the model."""
    torch.manual_seed(7)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), **options)
    return get_peft_model(copy.deepcopy(model), config)


def perturb(model, size=0.02, seed=3):
    """Stand in for training: move every trainable parameter a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter.dtype))


def known_spectrum(m, n, singular_values, seed=0, dtype=torch.float64):
    """Return ``U diag(S) Vᵀ`` with random orthonormal U, V, and the three parts."""
    generator = torch.Generator().manual_seed(seed)
    k = len(singular_values)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    S = torch.as_tensor(singular_values, dtype=torch.float64)
    return ((U * S) @ V.T).to(dtype), U, S, V.T


@torch.no_grad()
def logits(model, batch):
    """The model's logits in eval mode, without labels for decoder-only models."""
    was_training = model.training
    model.eval()
    out = model(**batch).logits
    model.train(was_training)
    return out
