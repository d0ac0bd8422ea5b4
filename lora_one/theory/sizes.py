"""How large the notebook's experiments are: ``full`` as published there, ``small`` for a check."""

import os
from typing import Any

SIZE_VARIABLE = "TOY_SIZE"

FULL: dict[str, dict[str, Any]] = {
    "alignment_times": {
        "dimensions": (64, 128, 256, 512, 1024, 2048),
        "conditions": (1.0, 2.0),
        "seeds": range(6),
        "rank": 16,
        "true_rank": 4,
        "rate": 0.2,
        "theta": 0.1,
    },
    "alignment_in_time": {"d": 256, "sizes": (1e-5,), "seeds": range(6), "steps": 100},
    "size_of_start": {
        "dimensions": (64, 256),
        "sizes": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        "seeds": range(3),
        "steps": 200,
    },
    "race": {
        "d": 64,
        "k": 48,
        "rank": 8,
        "true_rank": 4,
        "condition": 3.0,
        "seed": 0,
        "sizes": (1e-3, 1e-2, 1e-1, 0.5),
        "steps": 200,
    },
    "phase_portrait": {"seeds": range(8), "steps": 400},
    "rank_sweep": {"ranks": (1, 2, 3, 4, 6, 8, 12), "seeds": range(3), "steps": 400},
    "iterations": {
        "conditions": (1.0, 10.0, 1e2, 1e3, 1e4),
        "seeds": range(3),
        "dampings": (0.0, 1e-6, 1e-4, 1e-2),
        "limit": 20_000,
    },
    "error_curves": {"conditions": (1.0, 1e2, 1e4), "steps": 200},
    "adamw_errors": {"conditions": (1.0, 1e2, 1e4), "seeds": range(2), "steps": 400},
    "convergence": {"conditions": (1.0, 10.0, 100.0), "steps": 60},
    "sample_sizes": {
        "samples": (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
        "signals": (0.1, 0.5),
        "seeds": range(5),
    },
    "digits": {"seeds": range(5), "steps": 100},
    "language": {
        "steps": 100,
        "looks": (0, 1, 2, 5, 10, 20, 50, 100),
        "large_rows": 256,
        "validation_rows": 100,
        "test_rows": 100,
    },
    "one_step": {"rates": tuple(10 ** (i / 2) for i in range(-6, 4))},
}

SMALL: dict[str, dict[str, Any]] = FULL | {
    "alignment_times": FULL["alignment_times"] | {"dimensions": (64, 128, 256), "seeds": range(2)},
    "alignment_in_time": FULL["alignment_in_time"] | {"d": 64, "seeds": range(2), "steps": 60},
    "size_of_start": FULL["size_of_start"]
    | {"dimensions": (64,), "sizes": (1e-3, 1e-1), "seeds": range(1), "steps": 50},
    "race": FULL["race"] | {"steps": 40},
    "phase_portrait": {"seeds": range(2), "steps": 100, "grid": 60},
    "rank_sweep": {"ranks": (1, 3, 6), "seeds": range(1), "steps": 40},
    "iterations": FULL["iterations"] | {"conditions": (1.0, 1e2), "seeds": range(1), "limit": 500},
    "error_curves": {"conditions": (1.0, 1e2), "steps": 40},
    "adamw_errors": {"conditions": (1.0, 1e2), "seeds": range(1), "steps": 20},
    "convergence": {"conditions": (1.0, 10.0), "steps": 20, "samples": 2048},
    "sample_sizes": {"samples": (128, 1024), "signals": (0.1, 0.5), "seeds": range(1)},
    "digits": {"seeds": range(1), "steps": 10},
    "language": {
        "steps": 2,
        "looks": (0, 1, 2),
        "large_rows": 32,
        "validation_rows": 20,
        "test_rows": 4,
    },
    "one_step": {"rates": (0.1, 1.0)},
}


def sizes() -> dict[str, dict[str, Any]]:
    """Return the arguments of every experiment for the size that ``TOY_SIZE`` names.

    Raises:
        ValueError: for a size other than ``full`` (the default) and ``small``.
    """
    name = os.environ.get(SIZE_VARIABLE, "full")
    named = {"full": FULL, "small": SMALL}
    if name not in named:
        raise ValueError(f"{SIZE_VARIABLE}={name} is not a size; use {' or '.join(named)}.")
    return named[name]
