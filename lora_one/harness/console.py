"""What a person sees while a run goes on: plain lines and progress bars, from rank 0 only."""

import logging
import sys
import warnings

from rich.console import Console

from lora_one.harness.distributed.ranks import is_main


def say(text: str) -> None:
    """Print one line."""
    if is_main():
        print(text, flush=True)


def show_progress() -> bool:
    """Progress bars are for people: a terminal, and rank 0."""
    return is_main() and sys.stderr.isatty()


def make_console() -> Console:
    """Make the console for tables: as wide as the terminal, wide enough for a file."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def quiet_imports() -> None:
    """Keep what libraries say while they are imported off the terminal; call it before."""
    # On processors with AVX-512 bfloat16: that an optional kernel for 4-bit weights is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and notices off the terminal; errors still show."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
