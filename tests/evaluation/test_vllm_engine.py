"""What vLLM is asked, with a stand-in at the border: the real one needs a GPU."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lora_one.errors import InputError
from lora_one.evaluation import Sampling, generate_replies
from lora_one.evaluation.engines import Decoding
from lora_one.evaluation.vllm_engine import VllmEngine
from lora_one.tasks.base import Example


class Stand:
    """Takes the place of the module ``vllm``; answers with the tokens that our own code made."""

    def __init__(self, answers):
        self.answers, self.made, self.asked = answers, {}, []

    def modules(self):
        vllm, lora, request = (ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
        vllm.LLM = self._llm
        vllm.SamplingParams = lambda **settings: settings
        request.LoRARequest = lambda *arguments: arguments
        return {"vllm": vllm, "vllm.lora": lora, "vllm.lora.request": request}

    def _llm(self, **settings):
        self.made = settings
        return SimpleNamespace(generate=self._generate)

    def _generate(self, prompts, parameters, *, lora_request, use_tqdm):
        self.asked.append((prompts, parameters, lora_request))
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(token_ids=tuple(self.answers[tuple(p["prompt_token_ids"])]))
                ]
            )
            for p in prompts
        ]


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12}))
    return tmp_path


def _examples(prompts):
    return [Example(str(index), prompt, "", None) for index, prompt in enumerate(prompts)]


def _engine(monkeypatch, tokenizer, answers=None, **options):
    stand = Stand(answers or {})
    for name, module in stand.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    engine = VllmEngine(
        "base", tokenizer, **{"eos": [2, 5], "adapter": None, "dtype": "float32", **options}
    )
    return engine, stand


def test_without_vllm_the_message_says_what_to_do(monkeypatch, llama_tokenizer):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"pip install vllm.*engine=transformers"):
        VllmEngine("base", llama_tokenizer, eos=[2], adapter=None, dtype="float32")


def test_the_base_model_gets_the_adapter_with_a_rank_that_vllm_takes(
    monkeypatch, llama_tokenizer, adapter
):
    _, stand = _engine(monkeypatch, llama_tokenizer, adapter=adapter, revision="abc")
    assert stand.made == {
        "model": "base",
        "revision": "abc",
        "trust_remote_code": False,
        "dtype": "float32",
        "generation_config": "vllm",
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras": 1,
    }
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {"q": 40}}))
    assert _engine(monkeypatch, llama_tokenizer, adapter=adapter)[1].made["max_lora_rank"] == 64
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 1000}))
    with pytest.raises(InputError, match="rank 1000, and vLLM takes at most 512"):
        _engine(monkeypatch, llama_tokenizer, adapter=adapter)


def test_a_greedy_request_says_everything_and_replies_are_read_as_ours(
    monkeypatch, llama, llama_tokenizer, prompts, adapter
):
    """Given the token ids that our own decoding makes, the replies are our own."""
    stop = ("zz", "\nQ:")
    ours = generate_replies(
        llama,
        llama_tokenizer,
        prompts,
        architecture="causal",
        batch_size=4,
        max_new_tokens=9,
        stop_strings=stop,
    )
    ids = llama_tokenizer(prompts)["input_ids"]
    # One token a letter, and this model never ends a reply by itself.
    said = [llama_tokenizer.convert_tokens_to_ids(list(r.text.replace(" ", "Ġ"))) for r in ours]
    answers = {tuple(prompt): reply for prompt, reply in zip(ids, said, strict=True)}
    engine, stand = _engine(monkeypatch, llama_tokenizer, answers, adapter=adapter)
    seen = {}
    examples, keys = _examples(prompts), [str(index) for index in range(len(prompts))]
    replies = engine.reply(
        examples,
        keys,
        Decoding(9, stop),
        lambda places, made: seen.update(zip(places, made, strict=True)),
    )
    assert replies == ours
    assert seen == dict(enumerate(ours))
    ((requests, parameters, request),) = stand.asked
    assert [request["prompt_token_ids"] for request in requests] == ids
    greedy = {"temperature": 0.0, "max_tokens": 9, "stop": list(stop), "stop_token_ids": [2, 5]}
    assert parameters == [greedy] * len(prompts)
    assert request == ("adapter", 1, str(adapter.resolve()))


def test_drawn_replies_have_a_seed_each(monkeypatch, llama_tokenizer):
    ids = llama_tokenizer(["a", "b"])["input_ids"]
    engine, stand = _engine(monkeypatch, llama_tokenizer, {tuple(i): [7, 2] for i in ids})
    decoding = Decoding(3, sampling=Sampling(0.7, 0.9, seed=4))
    replies = engine.reply(_examples(["a", "b"]), ["a", "b"], decoding, lambda *_: None)
    assert [reply.stop_reason for reply in replies] == ["eos", "eos"]
    first, second = stand.asked[0][1]
    assert (first["temperature"], first["top_p"], first["stop"]) == (0.7, 0.9, None)
    assert 0 <= first["seed"] < 2**32
    assert first["seed"] != second["seed"]


def test_a_prompt_that_fills_the_context_is_not_asked(monkeypatch, llama_tokenizer):
    ids = llama_tokenizer(["abc"])["input_ids"]
    engine, stand = _engine(monkeypatch, llama_tokenizer, {tuple(ids[0]): [7]}, context=6)
    examples = _examples(["abc", "abcdefgh"])
    replies = engine.reply(examples, ["0", "1"], Decoding(9), lambda *_: None)
    assert [p["prompt_token_ids"] for p in stand.asked[0][0]] == ids
    assert stand.asked[0][1][0]["max_tokens"] == 2
    assert (replies[1].text, replies[1].stop_reason, replies[1].tokens) == ("", "length", 0)
