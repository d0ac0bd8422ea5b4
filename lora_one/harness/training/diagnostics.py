"""``diagnostics=``: which layers are looked at while they train, and when."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerState

from lora_one.adapters.write import initial_state
from lora_one.diagnostics import GradientSpace, measure
from lora_one.errors import InputError, nearest
from lora_one.harness.config.schema import Config
from lora_one.harness.data.rows import Batch, Data, batches_of
from lora_one.harness.distributed.ranks import world_size
from lora_one.harness.training.loop import require_finite_weights
from lora_one.layers import adapted_layers
from lora_one.tasks.encoding import Collator

SPACES = "diagnostics.safetensors"

Spaces = Mapping[str, GradientSpace]


def choose_layers(wanted: int | str | Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Return the layers that ``diagnostics.layers`` asks for, in the model's order.

    Args:
        wanted: None for none, ``all``, how many, or names of layers, their endings, or shell
            patterns of either.
        names: of the adapted layers, in the model's order.

    Raises:
        InputError: a name that no layer has, or more layers than there are.
    """
    if wanted is None:
        return []
    if wanted == "all":
        return list(names)
    if isinstance(wanted, int):
        return _spread(wanted, names)
    chosen: set[str] = set()
    for pattern in wanted:
        found = {name for name in names if fnmatchcase(f".{name}", f"*.{pattern}")}
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise InputError(
                f"diagnostics.layers: {pattern} names no adapted layer."
                f"{nearest(pattern, [*names, *kinds])} Adapted layers: {', '.join(kinds)}, such as "
                f"{names[0]}."
            )
        chosen |= found
    return [name for name in names if name in chosen]


def _spread(count: int, names: Sequence[str]) -> list[str]:
    """Return so many names at equal distances, the first and the last among them."""
    if count > len(names):
        raise InputError(
            f"diagnostics.layers={count}: the adapter changes {len(names)} layers. Give at most "
            f"{len(names)}, or diagnostics.layers=all."
        )
    if count == 1:
        return [names[len(names) // 2]]
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def reference_batches(
    config: Config, data: Data, collator: Collator, init: list[Batch]
) -> list[Batch]:
    """Return the batches of the gradient that is compared with: the init batch, or own rows.

    Raises:
        InputError: ``diagnostics.rows`` asks for too many, or for what ranks cannot share evenly.
    """
    rows = config.diagnostics.rows
    if config.diagnostics.layers is None or rows is None:
        return init
    if rows > len(data.train):
        raise InputError(f"diagnostics.rows={rows}: there are {len(data.train)} training rows.")
    if rows % world_size():
        raise InputError(
            f"diagnostics.rows={rows} cannot be shared evenly by {world_size()} ranks: give a "
            f"multiple of {world_size()}."
        )
    return batches_of(data.train.rows[:rows], 1, collator)


def measurement(
    model: PeftModel, names: Sequence[str], spaces: Spaces
) -> Callable[[], dict[str, Any]]:
    """Return what measures the chosen layers as they are when it is called."""
    started = initial_state(model).factors
    starts = {name: start for name, start in started.items() if start[0].any()}
    layers = [layer for layer in adapted_layers(model) if layer.name in names]

    def values() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for layer in layers:
            found |= measure(layer, spaces.get(layer.name), starts.get(layer.name))
        return found

    return values


class Observer(TrainerCallback):
    """Looks at the start, the first step, every so many steps and the last one; on rank 0.

    Args:
        model: What is looked at.
        observe: Measures and logs it at a step.
        every: How many steps lie between two looks.
        last: The last step.
    """

    def __init__(
        self, model: nn.Module, observe: Callable[[int], None], every: int, last: int
    ) -> None:
        self._model, self._observe, self._every, self._last = model, observe, every, last

    def on_train_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Look at the start, unless the run goes on from a checkpoint."""
        if state.global_step == 0:
            self._observe(0)

    def on_step_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Look at a step that is due, before a checkpoint of it is written."""
        step = state.global_step
        if step in (1, self._last) or step % self._every == 0:
            require_finite_weights(self._model, step)
            self._observe(step)


def save_spaces(spaces: Spaces, folder: Path) -> None:
    """Write them into the folder of a checkpoint."""
    tensors = {
        f"{name}/{side}": tensor.contiguous()
        for name, space in spaces.items()
        for side, tensor in space._asdict().items()
    }
    save_file(tensors, folder / SPACES)


def load_spaces(folder: Path) -> dict[str, GradientSpace]:
    """Return what ``save_spaces`` has written."""
    tensors = load_file(folder / SPACES)
    names = {key.rpartition("/")[0] for key in tensors}
    return {name: GradientSpace(tensors[f"{name}/U"], tensors[f"{name}/V"]) for name in names}
