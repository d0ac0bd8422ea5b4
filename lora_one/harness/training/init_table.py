"""The init report as a table, one line per layer (``verbose=true``)."""

from typing import Any

from rich.table import Table

from lora_one.harness.console import make_console
from lora_one.harness.distributed.ranks import is_main


def show_layers(report: dict[str, Any]) -> None:
    """Print what each layer's start is made of; nothing where a method decomposes nothing."""
    if not is_main() or not report.get("layers"):
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", no_wrap=True)
    columns = ("shape", "rank", "σ_1", "σ_r", "σ_r+1", "energy", "‖s B0 A0‖ / ‖W‖")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for layer in report["layers"]:
        kept = layer["singular_values"] or [None]
        table.add_row(
            layer["name"],
            "{} x {}".format(*layer["shape"]),
            str(layer["rank"]),
            *(_number(value) for value in (kept[0], kept[-1], layer["next_singular_value"])),
            _number(layer["captured_energy"]),
            _number(layer["norm_ratio"]),
        )
    make_console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
