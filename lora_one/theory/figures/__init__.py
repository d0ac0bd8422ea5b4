"""One function per picture of ``Toy_Experiments.ipynb``: results in, picture out."""

from lora_one.theory.figures.conditioning import adamw, conditioning
from lora_one.theory.figures.language import language_angles, one_step
from lora_one.theory.figures.linear import alignment, phase_portrait, race, ranks, size_of_start
from lora_one.theory.figures.nonlinear import digits, relu_convergence, sample_sizes

__all__ = [
    "adamw",
    "alignment",
    "conditioning",
    "digits",
    "language_angles",
    "one_step",
    "phase_portrait",
    "race",
    "ranks",
    "relu_convergence",
    "sample_sizes",
    "size_of_start",
]
