"""The exceptions with a meaning of their own, and what their messages share."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class InputError(ValueError):
    """What was given cannot be used; the message says what was expected and what to do.

    The command line turns it into exit status 2. It is a ``ValueError``, so library users need
    not know it.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the valid name closest to ``name``, or ``""``."""
    by_lower_case = {choice.lower(): choice for choice in valid}
    matches = get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower_case[matches[0]]}'?" if matches else ""


def some(items: Sequence[str], count: int = 3) -> str:
    """Return the first items, and how many more there are; ``"none"`` for none."""
    shown = ", ".join(items[:count]) or "none"
    return shown + (f" and {len(items) - count} more" if len(items) > count else "")


class NotPreparedError(InputError):
    """A model or data set is not on this machine, and the hub cannot be asked for it.

    The command line adds the command that prepares it where there is a network.
    """


class NonFiniteError(FloatingPointError):
    """A loss, gradient or weight is infinite or not a number; the message says where."""


def not_finite(layer: str, what: str = "gradient") -> NonFiniteError:
    """Return the error for a layer's gradient, or for what else of it is not finite."""
    advice = "" if what == "weight" else " Try fp32 or bf16 weights, or look at the init rows."
    return NonFiniteError(f"the {what} of layer '{layer}' is not finite.{advice}")


class RunHeldError(InputError):
    """Another live process is doing this run; the message says which, and where.

    The command line turns it into exit status 75: try again later.
    """


class PreemptedError(BaseException):
    """The run was asked to stop and did, with what it has done kept; the message says by whom.

    The command line turns it into exit status 75: the same command goes on where it stopped. No
    ``Exception``, since a signal may raise it anywhere: a library's ``except Exception`` must not
    take it for a failure of its own.

    Attributes:
        requeues: Whether what stopped the run lets it come back by itself.
    """

    def __init__(self, message: str, *, requeues: bool = False) -> None:
        super().__init__(message)
        self.requeues = requeues


class StorageError(Exception):
    """The run folder cannot be written any more: a full disk, a file system that is gone.

    The command line turns it into one message and exit status 1: room made, the same command goes
    on from the newest checkpoint.
    """


class PeerError(RuntimeError):
    """Another rank never came, or left before its work was done; the message says which."""
