"""Replies by vLLM (https://docs.vllm.ai), where it is installed: the same prompts, ids and rules.

vLLM gets token ids, not text, and gives token ids back; both borders are those of
``generate_replies``, so only the arithmetic in between differs. The adapter is the exported one,
plain LoRA on the untouched base.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_one.adapters.serving import VLLM_RANKS, vllm_rank
from lora_one.errors import InputError
from lora_one.evaluation.context import room_for_reply
from lora_one.evaluation.engines import Decoding
from lora_one.evaluation.generation import OnReplies, Reply, make_reply
from lora_one.tasks.base import Example
from lora_one.tasks.encoding import encode_prompts

# Requests handed over at a time: many times what vLLM decodes together, so that its scheduler is
# kept busy, and few enough that a kill loses little.
CHUNK = 1024


def require_vllm() -> Any:
    """Import vLLM.

    Raises:
        InputError: It is not installed.
    """
    try:
        import vllm
    except ImportError:
        raise InputError(
            "evaluation.engine=vllm needs vLLM, which is not installed here: pip install vllm (it "
            "needs a GPU), or give evaluation.engine=transformers"
        ) from None
    return vllm


class VllmEngine:
    """A base model in vLLM, with an adapter or without.

    Args:
        model: Hub id or folder of the base model.
        tokenizer: The run's tokenizer, which makes the prompt ids.
        eos: Every id that ends a reply (``generation.eos_token_ids``).
        adapter: Folder of a plain LoRA adapter; None: the model as it is.
        dtype: ``float32`` or ``bfloat16``.
        revision: Hub branch, tag or commit.
        trust_remote_code: Run Python code that comes with the model.
        context: Tokens that prompt and reply share; None: as the model's config says.

    Raises:
        InputError: vLLM is not installed, or has no place for the adapter's rank.
    """

    reads_texts = False

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        *,
        eos: Sequence[int],
        adapter: Path | None,
        dtype: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        context: int | None = None,
    ) -> None:
        self._vllm = require_vllm()
        self._tokenizer = tokenizer
        self._eos = frozenset(eos)
        self._context = context
        self._request, lora = None, {}
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._request = LoRARequest("adapter", 1, str(Path(adapter).resolve()))
            rank = fitting_rank(_largest_rank(adapter))
            lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        self._llm = self._vllm.LLM(
            model=model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            # Nothing of the checkpoint's generation_config: the request says everything.
            generation_config="vllm",
            **lora,
        )

    def reply(
        self,
        examples: Sequence[Example],
        keys: Sequence[str],
        decoding: Decoding,
        on_replies: OnReplies,
    ) -> list[Reply]:
        """Answer in chunks; a prompt that fills the context gets an empty reply."""
        ids = encode_prompts([e.prompt for e in examples], self._tokenizer, architecture="causal")
        replies: dict[int, Reply] = {}
        for start in range(0, len(examples), CHUNK):
            places = range(start, min(start + CHUNK, len(examples)))
            limits = {
                p: room_for_reply(self._context, len(ids[p]), "causal", decoding.max_new_tokens)
                for p in places
            }
            asked = [place for place in places if limits[place] > 0]
            outputs = self._llm.generate(
                [{"prompt_token_ids": ids[place]} for place in asked],
                [self._parameters(decoding, limits[place], keys[place]) for place in asked],
                lora_request=self._request,
                use_tqdm=False,
            )
            generated = {
                place: list(output.outputs[0].token_ids)
                for place, output in zip(asked, outputs, strict=True)
            }
            made = [
                make_reply(self._tokenizer, generated.get(p, []), self._eos, decoding.stop_strings)
                for p in places
            ]
            replies.update(zip(places, made, strict=True))
            on_replies(places, made)
        return [replies[place] for place in range(len(examples))]

    def compare(self, examples: Sequence[Example]) -> list[list[float]]:
        """Refuse; the harness says so before anything is loaded.

        Raises:
            InputError: always.
        """
        raise InputError("evaluation.engine=vllm does not compare choices: use transformers")

    def _parameters(self, decoding: Decoding, limit: int, key: str) -> Any:
        sampling = decoding.sampling
        drawn = {"temperature": 0.0}
        if sampling is not None:
            # A seed of 32 bits for each reply, so that its neighbours do not change it.
            seed = int.from_bytes(sha256(f"{sampling.seed}\x1f{key}".encode()).digest()[:4])
            drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
        return self._vllm.SamplingParams(
            max_tokens=limit,
            stop=list(decoding.stop_strings) or None,
            stop_token_ids=sorted(self._eos),
            **drawn,
        )


def _largest_rank(adapter: Path) -> int:
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def fitting_rank(rank: int) -> int:
    """Return the smallest rank that vLLM takes and an adapter of this rank fits into.

    Raises:
        InputError: There is none.
    """
    fitting = vllm_rank(rank)
    if fitting is None:
        raise InputError(
            f"the adapter has rank {rank}, and vLLM takes at most {VLLM_RANKS[-1]}: cut it with "
            "export.rank, or give evaluation.engine=transformers"
        )
    return fitting
