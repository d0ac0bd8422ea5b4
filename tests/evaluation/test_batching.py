"""As many rows as fit; what does not fit is tried again with half as many."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from lora_one.evaluation import batching, generate_replies
from lora_one.evaluation.batching import Batches, bytes_per_token


class Memory:
    """Work that fails as a GPU does when more than so many rows are decoded together."""

    def __init__(self, rows):
        self.rows, self.tried = rows, []

    def __call__(self, batch):
        self.tried.append(len(batch))
        if len(batch) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [f"done {job}" for job in batch]


def _run(model, batch_size, work, jobs=20, length=10):
    return list(Batches(model, batch_size).run(range(jobs), [length] * jobs, work))


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost_or_done_twice(llama):
    work = Memory(6)
    batches = _run(llama, "auto", work)
    assert work.tried == [20, 10, 5, 5, 5, 5]
    assert [job for batch, _ in batches for job in batch] == list(range(20))
    assert [text for _, made in batches for text in made] == [f"done {job}" for job in range(20)]


def test_one_row_that_does_not_fit_is_an_error(llama):
    with pytest.raises(torch.OutOfMemoryError):
        _run(llama, "auto", Memory(0))


def test_a_size_that_was_asked_for_is_not_changed_behind_the_users_back(llama):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        _run(llama, 8, Memory(6))
    assert caught.value.__notes__ == ["Give a smaller evaluation.batch_size, or auto."]


def test_on_a_cpu_the_rows_are_bounded_by_number_and_by_memory(llama, monkeypatch):
    work = Memory(10**6)
    _run(llama, "auto", work, jobs=300)
    assert work.tried == [128, 128, 44]
    # 2 layers x 2 heads of 8 numbers, keys and values, of 4 bytes
    assert bytes_per_token(llama) == 2 * 2 * 2 * 8 * 4
    monkeypatch.setattr(batching, "CPU_BUDGET", 3 * 10 * 256)
    work = Memory(10**6)
    _run(llama, "auto", work, jobs=7, length=10)
    assert work.tried == [3, 3, 1]


def test_shorter_rows_make_larger_batches(llama, monkeypatch):
    monkeypatch.setattr(batching, "CPU_BUDGET", 40 * 256)
    work = Memory(10**6)
    list(Batches(llama, "auto").run(range(8), [20, 20, 10, 10, 10, 10, 1, 1], work))
    assert work.tried == [2, 4, 2]


def test_an_encoder_decoder_keeps_keys_and_values_of_its_decoder(t5):
    # 2 layers x 4 heads of 8 numbers, keys and values, of 4 bytes
    assert bytes_per_token(t5) == 2 * 2 * 4 * 8 * 4


def test_replies_survive_a_batch_that_did_not_fit(llama, llama_tokenizer, prompts, monkeypatch):
    options = {"architecture": "causal", "max_new_tokens": 8}
    expected = generate_replies(llama, llama_tokenizer, prompts, batch_size=4, **options)
    original = llama.generate

    def small(**inputs):
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(**inputs)

    monkeypatch.setattr(llama, "generate", small)
    fitting = generate_replies(llama, llama_tokenizer, prompts, batch_size="auto", **options)
    assert fitting == expected


def test_a_model_without_attention_heads_gets_a_fixed_number_of_rows(llama_tokenizer, prompts):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(llama_tokenizer), hidden_size=32, num_hidden_layers=2)
    model = MambaForCausalLM(config).eval()
    assert bytes_per_token(model) is None
    work = Memory(10)
    _run(model, "auto", work, jobs=40)
    assert work.tried == [16, 8, 8, 8, 8, 8]
    options = {"architecture": "causal", "max_new_tokens": 4}
    replies = generate_replies(model, llama_tokenizer, prompts, batch_size="auto", **options)
    assert all(0 < reply.tokens <= 4 for reply in replies)
