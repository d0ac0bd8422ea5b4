"""What the one-step gradient holds in memory, counted tensor by tensor."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_one
from lora_one.adapters.cache import fingerprint
from lora_one.adapters.write import Options
from lora_one.gradients.stream import stream_gradients
from lora_one.layers import adapted_layers

from .tiny import adapted, batches_for, tiny_llama


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations create, and their peak."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.current = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.known.discard(key)
        self.current -= size


def peak(layers, strategy):
    model = adapted(tiny_llama(num_hidden_layers=layers))
    batches = batches_for()
    with LiveBytes(model) as live:
        stream_gradients(
            model, batches, adapted_layers(model), lambda name, gradient: None, strategy=strategy
        )
    return live.peak, batches, model


def test_joined_and_checkpointed_memory_grows_by_one_hidden_state_per_layer():
    shallow, batches, model = peak(2, "join")
    deep, *_ = peak(10, "join")
    rows = sum(len(batch["input_ids"]) for batch in batches)
    width = max(batch["input_ids"].shape[1] for batch in batches)
    hidden_state = rows * width * model.config.hidden_size * 4
    assert deep - shallow == pytest.approx(8 * hidden_state, rel=0.02)


def test_holding_every_gradient_grows_by_the_weights():
    shallow, *_ = peak(2, "hold")
    deep, _, model = peak(10, "hold")
    weights = sum(
        m.base_layer.weight.numel()
        for name, m in model.named_modules()
        if hasattr(m, "base_layer") and ".layers.0." in name
    )
    assert deep - shallow >= 8 * 4 * weights


def test_the_key_of_a_cached_start_takes_no_copy_of_a_weight():
    model = adapted(tiny_llama(vocab_size=200_000))
    layers, options = adapted_layers(model), Options(method="lora_one")
    with LiveBytes(model) as live:
        fingerprint(model, layers, batches_for(), options)
    assert live.peak < model.get_input_embeddings().weight.nbytes


def test_a_start_waits_for_the_last_layer_without_its_decomposition(monkeypatch):
    held = []
    monkeypatch.setattr(
        "lora_one.adapters.initialize.start_adapter",
        lambda model, name, layers, starts, options: held.extend(tree_leaves(starts)),
    )
    model = adapted(tiny_llama())
    lora_one.initialize(model, batches_for(), method="lora_ga", measure_loss=False)
    storages = [part.untyped_storage() for part in held if isinstance(part, torch.Tensor)]
    sizes = {storage._cdata: storage.nbytes() for storage in storages}
    factors = (factor for layer in adapted_layers(model) for factor in (layer.A, layer.B))
    assert sum(sizes.values()) == sum(factor.nbytes for factor in factors)
