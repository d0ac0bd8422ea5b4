"""Bases whose weights are no matrices of numbers as they are stored: FP8, and unknown formats."""

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

import lora_one
from lora_one.adapters import merge_folder
from lora_one.adapters.merge import merge_adapter
from lora_one.adapters.stored import read_stored
from lora_one.layers import adapted_layers, base_weight

from .tiny import adapted, tiny_llama

LARGEST = 448  # of float8_e4m3fn
TARGETS = ["q_proj", "down_proj"]


def fp8_linear(W, block):
    """Pack W as transformers does, each block with a scale of its own; None is one for all."""
    m, n = W.shape
    rows, columns = block or (m, n)
    new = FP8Linear(n, m, block_size=block)
    scales = torch.empty(-(-m // rows), -(-n // columns))
    packed = torch.empty(m, n)
    for i, part in enumerate(W.split(rows, 0)):
        for j, piece in enumerate(part.split(columns, 1)):
            scales[i, j] = piece.abs().max() / LARGEST
            places = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            packed[places] = piece / scales[i, j]
    new.weight = nn.Parameter(packed.to(torch.float8_e4m3fn), requires_grad=False)
    new.weight_scale_inv = nn.Parameter(scales if block else scales[0, 0], requires_grad=False)
    return new


class Unknown(nn.Linear):
    """Two 4-bit numbers a byte, by no rule that the library knows."""

    def __init__(self, W):
        super().__init__(*reversed(W.shape), bias=False)
        packed = torch.zeros(W.shape[0], W.shape[1] // 2, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def packed_llama(pack):
    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if name.endswith(tuple(TARGETS)):
            model.set_submodule(name, pack(module.weight.detach()))
    return model


def gradients_of(peft_model):
    generator = torch.Generator().manual_seed(0)
    layers = adapted_layers(peft_model)
    return {x.name: torch.randn(x.shape, generator=generator) for x in layers}


@pytest.mark.parametrize("block", [None, (32, 20)])  # 20 divides neither 32 nor 48
def test_the_report_and_norm_clip_look_at_the_weight_that_fp8_stands_for(block):
    plain = adapted(tiny_llama(), targets=TARGETS)
    packed = adapted(packed_llama(lambda W: fp8_linear(W, block)), targets=TARGETS)
    for ours, exact in zip(adapted_layers(packed), adapted_layers(plain), strict=True):
        W = exact.module.weight
        # Three bits after the leading one, of numbers that are no larger than the largest.
        assert (base_weight(ours.module) - W).abs().max() <= W.abs().max() / 16
    options = {"method": "lora_one", "stable_gamma": 1e-3, "norm_clip": True}
    reports = [
        lora_one.initialize_adapters(model, gradients_of(model), **options)
        for model in (plain, packed)
    ]
    for exact, ours in zip(reports[0].layers, reports[1].layers, strict=True):
        assert ours.norm_ratio == pytest.approx(exact.norm_ratio, rel=0.1)


def test_fp8_weights_are_neither_rewritten_nor_merged(tmp_path, monkeypatch):
    model = packed_llama(lambda W: fp8_linear(W, (16, 16)))
    for method in ("pissa", "gaussian"):
        with pytest.raises(lora_one.InputError, match=r"is quantised, and .* rewrite"):
            lora_one.initialize(adapted(model, targets=TARGETS), method=method)
    with pytest.raises(lora_one.InputError, match="merge it into the unquantised"):
        merge_adapter(adapted(model, targets=TARGETS))
    lora_one.export_adapter(adapted(tiny_llama(), targets=TARGETS), tmp_path / "a")
    monkeypatch.setattr(merge_folder, "_load", lambda *_: model)
    with pytest.raises(lora_one.InputError, match="merge it into the unquantised"):
        merge_folder.merge_folder(read_stored(tmp_path / "a"), tmp_path / "m", base=str(tmp_path))


def test_a_weight_in_an_unknown_format_is_never_taken_for_the_matrix():
    model = packed_llama(Unknown)
    peft_model = adapted(model, targets=TARGETS)
    gradients = gradients_of(peft_model)
    with pytest.raises(lora_one.InputError, match=r"q_proj' is a Unknown, .* not known here"):
        lora_one.initialize_adapters(peft_model, gradients, method="lora_one", norm_clip=True)
    with pytest.raises(lora_one.InputError, match=r"q_proj' is a Unknown, .* not known here"):
        lora_one.allocate_ranks(model, rank=2, target_modules=TARGETS, method="pissa")
    report = lora_one.initialize_adapters(peft_model, gradients, method="lora_one")
    assert all(entry.norm_ratio is None for entry in report.layers)
