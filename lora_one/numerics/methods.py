"""The registry of initialisers: what each is called, needs and does. It imports no torch.

The command line and the configuration read it before torch is loaded; the function itself is found
on first use. A new method is one function in ``lora_one.numerics.factors`` and one line here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_one.numerics.factors import Factors, Layer


@dataclass(frozen=True)
class Method:
    """An initialiser and what it needs.

    Attributes:
        name: of the function in ``lora_one.numerics.factors``; what ``method=`` and ``init=`` say.
        title: the spelling of the papers; what ``init.direction`` says.
        needs: ``"gradient"``, ``"weight"`` or ``""``.
        inputs: the statistic C of the layer's inputs that it needs, ``"covariance"`` or ``"second
            moment"`` (see ``lora_one.gradients.inputs``), or ``""``.
        offset: whether ``s B A`` is taken from the base weight, so that outputs do not change.
        uses_scale: whether both factors are multiplied by ``size_factors``, so that ``scale`` and
            ``gamma`` have an effect.
        rank_multiple: how many times r triplets must exist, and at most are asked for.
        triplets_only: whether all it asks of G is ``gradient_svd``, so that processes can keep
            their summands of G to themselves.
    """

    name: str
    title: str
    needs: str = ""
    inputs: str = ""
    offset: bool = False
    uses_scale: bool = False
    rank_multiple: int = 1
    triplets_only: bool = False

    @property
    def function(self) -> "Callable[[Layer], Factors]":
        """The pure function; the first line of its docstring is the reported equation."""
        return getattr(import_module("lora_one.numerics.factors"), self.name)

    @property
    def from_rows(self) -> bool:
        """Whether the start depends on the rows of the init batch."""
        return self.needs == "gradient" or bool(self.inputs)

    @property
    def searches_gamma(self) -> bool:
        """Whether the loss after the start depends on gamma, so that ``"auto"`` can choose it."""
        return self.uses_scale and not self.offset

    @property
    def equation(self) -> str:
        """The first line of the function's docstring."""
        return self.function.__doc__.splitlines()[0]

    @property
    def source(self) -> str:
        """The sentence of the docstring that names the paper or the code."""
        text = " ".join(self.function.__doc__.split())
        # The stop of «et al.» ends no sentence.
        return re.split(r"(?<!et al)\. ", text.partition("Source: ")[2])[0].removesuffix(".")


_ALL = (
    Method("lora", "LoRA"),
    Method("gaussian", "gaussian", offset=True, uses_scale=True),
    Method("kaiming", "kaiming", offset=True, uses_scale=True),
    Method("orthogonal", "orthogonal", offset=True, uses_scale=True),
    Method("pissa", "PiSSA", needs="weight", offset=True),
    Method("olora", "OLoRA", needs="weight", offset=True),
    Method(
        "lora_ga",
        "LoRA-GA",
        needs="gradient",
        offset=True,
        uses_scale=True,
        rank_multiple=2,
        triplets_only=True,
    ),
    Method("eva", "EVA", inputs="covariance"),
    Method("corda", "CorDA", needs="weight", inputs="second moment", offset=True),
    Method("lora_one", "LoRA-One", needs="gradient", uses_scale=True, triplets_only=True),
)
METHODS = {method.name: method for method in _ALL}
