"""What answers examples: a model in this process, or vLLM (``vllm_engine.py``)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn

from lora_one.evaluation.batching import BatchSize, choice_rows
from lora_one.evaluation.choices import choice_log_probabilities
from lora_one.evaluation.generation import OnReplies, Reply, generate_replies
from lora_one.evaluation.sampling import Sampling
from lora_one.tasks.base import Example
from lora_one.tasks.encoding import Architecture


@dataclass(frozen=True)
class Decoding:
    """What a reply is, whatever makes it.

    Attributes:
        max_new_tokens: Longest reply.
        stop_strings: A reply ends where the first of these begins.
        samples: Replies to every prompt.
        sampling: How they are drawn; None is greedy, and then there is one.
    """

    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    samples: int = 1
    sampling: Sampling | None = None


class Engine(Protocol):
    """Answers the examples of a benchmark.

    Attributes:
        reads_texts: It reads the texts of an example, and not the prompt.
    """

    reads_texts: bool

    def reply(
        self,
        examples: Sequence[Example],
        keys: Sequence[str],
        decoding: Decoding,
        on_replies: OnReplies,
    ) -> list[Reply]:
        """Answer examples, each with random numbers seeded by its key."""

    def compare(self, examples: Sequence[Example]) -> list[list[float]]:
        """Return log p(choice | prompt) for every choice of every example, all of which have some.

        An empty list stands for choices that could not be compared.
        """


@dataclass(frozen=True)
class TransformersEngine:
    """A model in this process.

    Attributes:
        model: Model or ``PeftModel``; left in the mode it came in.
        tokenizer: Its tokenizer.
        architecture: ``causal`` or ``seq2seq``.
        batch_size: Rows decoded together; ``auto``: as many as fit.
    """

    reads_texts: ClassVar[bool] = False

    model: nn.Module
    tokenizer: Any
    architecture: Architecture
    batch_size: BatchSize

    def reply(
        self,
        examples: Sequence[Example],
        keys: Sequence[str],
        decoding: Decoding,
        on_replies: OnReplies,
    ) -> list[Reply]:
        """Decode in batches (``generate_replies``)."""
        return generate_replies(
            self.model,
            self.tokenizer,
            [example.prompt for example in examples],
            architecture=self.architecture,
            batch_size=self.batch_size,
            max_new_tokens=decoding.max_new_tokens,
            stop_strings=decoding.stop_strings,
            sampling=decoding.sampling,
            keys=keys,
            on_replies=on_replies,
        )

    def compare(self, examples: Sequence[Example]) -> list[list[float]]:
        """Compare the probabilities of given replies (``choice_log_probabilities``)."""
        return choice_log_probabilities(
            self.model,
            self.tokenizer,
            [example.prompt for example in examples],
            [example.choices for example in examples],
            architecture=self.architecture,
            batch_size=choice_rows(self.batch_size),
        )
