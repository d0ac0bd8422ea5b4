"""The paper's claims as small experiments: problems, descent, measurements and their figures.

Names here are those of LoRA-One's sections 2 to 5, where inputs are rows and W is (d, k) = (in,
out): the model is ``X (W + A B)`` with A (d, r) and B (r, k). Hence A is PEFT's ``lora_A``
transposed and B is ``lora_B`` transposed. ``starts`` is the one place that translates.
"""
