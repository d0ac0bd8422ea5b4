"""Compares ``dpo_gradients`` of examples/trl_dpo.py with autograd through TRL's own loss."""

import runpy

import torch

example = runpy.run_path("examples/trl_dpo.py", run_name="__main__")
model, trainer, batches = example["model"], example["trainer"], example["batches"][:1]
ours = example["dpo_gradients"](batches)
pairs = len(batches[0]["input_ids"]) // 2

for name, parameter in model.named_parameters():
    parameter.requires_grad_(name.endswith("base_layer.weight"))
    if ".lora_B." in name:
        torch.nn.init.zeros_(parameter)  # the policy is the reference again
trainer.compute_loss(model, batches[0]).backward()
for name, gradient in ours.items():
    layer = model.get_base_model().get_submodule(name)
    exact = layer.base_layer.weight.grad
    error = (trainer.beta / (2 * pairs) * gradient - exact).norm() / exact.norm()
    assert error < 1e-4, f"{name}: relative error {error}"  # fp32 sums in another order
