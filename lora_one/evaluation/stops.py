"""Stop decoding a row once its reply holds a stop string.

What a reply is, and where it ends, ``generation.make_reply`` alone says. Stopping here saves the
tokens that it would cut off: a row that goes on for too long is still right, one that is stopped
too early is not.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

Decode = Callable[[list[int]], str]


class Stops:
    """Makes what ends the rows of a batch whose reply holds a stop string.

    The tokenizer's words are read once for all batches: 40 ms for 32,000 of them.

    Args:
        tokenizer: The model's.
        stop_strings: The texts.
        decode: Gives the text of a reply's ids.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str], decode: Decode) -> None:
        self._decode = decode
        self._matches = None
        if stop_strings:
            # No token can end one: T5 writes no line end.
            with suppress(ValueError):
                self._matches = StopStringCriteria(tokenizer, list(stop_strings))

    def criteria(self, skipped: int) -> StoppingCriteriaList:
        """Return the criteria of a batch with ``skipped`` ids in each row before its reply."""
        if self._matches is None:
            return StoppingCriteriaList()
        return StoppingCriteriaList([_StopInReply(self._matches, self._decode, skipped)])


class _StopInReply(StoppingCriteria):
    """Reads the replies of the rows that transformers takes to hold a stop string.

    It counts one that the prompt begins and the reply completes as well, such as a line end and
    "def".
    """

    def __init__(self, matches: StopStringCriteria, decode: Decode, skipped: int) -> None:
        self._matches = matches
        self._decode = decode
        self._skipped = skipped

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        stopped = self._matches(input_ids, scores)
        for row in stopped.nonzero().flatten().tolist():
            reply = self._decode(input_ids[row, self._skipped :].tolist())
            stopped[row] = any(stop in reply for stop in self._matches.stop_strings)
        return stopped
