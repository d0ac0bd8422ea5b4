"""Architectures that differ from a decoder of text in what the gradient relies on."""

import warnings

import torch
import transformers

import lora_one

from .test_gradients import assert_equal

ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}


def test_reentrant_checkpointing_reaches_blocks_without_embeddings():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**ENCODER, image_size=16, patch_size=8, num_labels=3)
    model = transformers.ViTForImageClassification(config).double()
    batches = [{"pixel_values": torch.randn(2, 3, 16, 16).double(), "labels": torch.tensor([0, 2])}]
    exact = lora_one.estimate_gradients(model, batches)
    model.activation_checkpointing_enable({"use_reentrant": True})
    before = model.vit.layers[0]._gradient_checkpointing_func
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(lora_one.estimate_gradients(model, batches), exact, 1e-6)
    assert model.vit.layers[0]._gradient_checkpointing_func is before
