from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lora_one.errors import InputError, NonFiniteError
from lora_one.evaluation import Sampling, generate_replies, stops

TOKENS = 20


def greedy_one_at_a_time(model, tokenizer, prompt, tokens=TOKENS):
    """The definition: no batch, no padding, no cache; the text up to EOS."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    reply = []
    with torch.no_grad():
        while len(reply) < tokens:
            if model.config.is_encoder_decoder:
                decoder = torch.tensor([[model.config.decoder_start_token_id, *reply]])
                logits = model(input_ids=ids, decoder_input_ids=decoder).logits
            else:
                logits = model(torch.cat([ids, torch.tensor([reply]).long()], dim=1)).logits
            token = int(logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            reply.append(token)
    return tokenizer.decode(reply, skip_special_tokens=True)


def _generate(model, tokenizer, prompts, architecture="causal", batch_size=8, **options):
    return generate_replies(
        model,
        tokenizer,
        prompts,
        architecture=architecture,
        batch_size=batch_size,
        **{"max_new_tokens": TOKENS, **options},
    )


@pytest.fixture
def learnt_positions(llama_tokenizer):
    """A GPT-2 that never ends a reply, and its context."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(llama_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64
    )
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wte.weight.data.mul_(20)  # replies that vary, without near ties
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight.data[:3] = 0.0
    return model, config.n_positions


@pytest.fixture(scope="module")
def llama_texts(make_model, llama_tokenizer, prompts):
    model = make_model["llama"]()
    return [greedy_one_at_a_time(model, llama_tokenizer, prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def t5_texts(make_model, t5_tokenizer, prompts):
    model = make_model["t5"]()
    return [greedy_one_at_a_time(model, t5_tokenizer, prompt) for prompt in prompts]


def _end_replies_at_a_common_letter(model, tokenizer, texts):
    """Make the letter an end of sequence that most replies contain, each at its own place."""
    letters = [letter for text in texts for letter in set(text[2:])]
    end = max(sorted(set(letters)), key=letters.count)
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(end)]
    return end


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_causal_replies_are_those_of_uncached_one_at_a_time_decoding(
    llama, llama_tokenizer, prompts, llama_texts, batch_size
):
    replies = _generate(llama, llama_tokenizer, prompts, batch_size=batch_size)
    assert [reply.text for reply in replies] == llama_texts
    assert len(set(llama_texts)) > 8


@pytest.mark.parametrize("batch_size", [1, 8])
def test_seq2seq_replies_are_those_of_uncached_one_at_a_time_decoding(
    t5, t5_tokenizer, prompts, t5_texts, batch_size
):
    replies = _generate(t5, t5_tokenizer, prompts, "seq2seq", batch_size)
    assert [reply.text for reply in replies] == t5_texts
    assert len(set(t5_texts)) > 8


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_rows_that_end_early_do_not_disturb_the_others(
    llama, llama_tokenizer, prompts, llama_texts, batch_size
):
    end = _end_replies_at_a_common_letter(llama, llama_tokenizer, llama_texts)
    replies = _generate(llama, llama_tokenizer, prompts, batch_size=batch_size)
    for reply, uncut in zip(replies, llama_texts, strict=True):
        assert reply.text == uncut.split(end)[0]
        assert reply.stop_reason == ("eos" if end in uncut else "length")
        assert reply.tokens == len(reply.text) + (end in uncut)
    assert len({reply.tokens for reply in replies}) > 3


def test_the_eos_of_the_tokenizer_ends_a_reply_and_is_no_part_of_its_text(
    llama, llama_tokenizer, prompts, llama_texts
):
    end = _end_replies_at_a_common_letter(llama, llama_tokenizer, llama_texts)
    llama.generation_config.eos_token_id = None
    # EOS now scores a little above the letter, so it is said in the letter's place.
    head = llama.lm_head.weight.data
    head[llama_tokenizer.eos_token_id] = 1.001 * head[llama_tokenizer.convert_tokens_to_ids(end)]
    replies = _generate(llama, llama_tokenizer, prompts)
    assert [reply.text for reply in replies] == [uncut.split(end)[0] for uncut in llama_texts]
    assert {reply.stop_reason for reply in replies} == {"eos", "length"}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_seq2seq_rows_that_end_early_do_not_disturb_the_others(
    t5, t5_tokenizer, prompts, t5_texts, batch_size
):
    end = _end_replies_at_a_common_letter(t5, t5_tokenizer, t5_texts)
    replies = _generate(t5, t5_tokenizer, prompts, "seq2seq", batch_size)
    assert [reply.text for reply in replies] == [uncut.split(end)[0] for uncut in t5_texts]
    assert len({reply.tokens for reply in replies}) > 3


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_reply_ends_where_a_stop_string_begins(
    llama, llama_tokenizer, prompts, llama_texts, batch_size
):
    stop = llama_texts[0][5:7]
    replies = _generate(
        llama, llama_tokenizer, prompts, batch_size=batch_size, stop_strings=["never said", stop]
    )
    for reply, uncut in zip(replies, llama_texts, strict=True):
        assert reply.text == uncut.split(stop)[0]
        assert reply.stop_reason == ("stop" if stop in uncut else "length")
        # One token a letter: what was generated past the stop string is not counted.
        assert reply.tokens == (len(reply.text) + len(stop) if stop in uncut else TOKENS)
    assert "stop" in {reply.stop_reason for reply in replies}


def test_a_stop_string_that_the_prompt_begins_does_not_end_the_reply(
    llama, llama_tokenizer, prompts, llama_texts
):
    both = [prompt[-1] + text[0] for prompt, text in zip(prompts, llama_texts, strict=True)]
    stops = [stop for stop in both if not any(stop in text for text in llama_texts)]
    assert stops
    replies = _generate(llama, llama_tokenizer, prompts, stop_strings=stops)
    assert [reply.text for reply in replies] == llama_texts


def test_a_stop_string_that_the_tokenizer_cannot_write_stops_nothing(t5, t5_tokenizer, prompts):
    expected = _generate(t5, t5_tokenizer, prompts, "seq2seq")
    assert _generate(t5, t5_tokenizer, prompts, "seq2seq", stop_strings=["é"]) == expected


def test_the_tokenizers_words_are_read_once_for_all_batches(
    llama, llama_tokenizer, prompts, monkeypatch
):
    made = []

    class Counted(stops.StopStringCriteria):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(stops, "StopStringCriteria", Counted)
    _generate(llama, llama_tokenizer, prompts, batch_size=1, max_new_tokens=2, stop_strings=["x"])
    assert len(made) == 1


def test_a_row_stops_being_decoded_soon_after_its_stop_string(llama, llama_tokenizer, llama_texts):
    steps = []
    llama.register_forward_hook(lambda *_: steps.append(1))
    _generate(llama, llama_tokenizer, ["x"], max_new_tokens=90, stop_strings=[llama_texts[0][5]])
    assert len(steps) <= 16


def test_the_order_of_prompts_does_not_matter(llama, llama_tokenizer, prompts):
    forwards = _generate(llama, llama_tokenizer, prompts, batch_size=5)
    backwards = _generate(llama, llama_tokenizer, prompts[::-1], batch_size=5)
    assert forwards == backwards[::-1]


def test_sampling_settings_of_the_checkpoint_have_no_effect(llama, llama_tokenizer, prompts):
    expected = _generate(llama, llama_tokenizer, prompts)
    llama.generation_config.update(
        do_sample=True, temperature=5.0, top_p=0.9, repetition_penalty=5.0, min_new_tokens=30
    )
    assert _generate(llama, llama_tokenizer, prompts) == expected


def test_padding_side_and_pad_token_of_the_tokenizer_do_not_matter(
    llama, llama_tokenizer, prompts, monkeypatch
):
    expected = _generate(llama, llama_tokenizer, prompts)
    monkeypatch.setattr(llama_tokenizer, "padding_side", "right")
    monkeypatch.setattr(
        llama_tokenizer,
        "_special_tokens_map",
        {**llama_tokenizer._special_tokens_map, "pad_token": None},
    )
    assert llama_tokenizer.pad_token_id is None
    assert _generate(llama, llama_tokenizer, prompts) == expected


@pytest.mark.parametrize(
    ("architecture", "task_type"), [("causal", "CAUSAL_LM"), ("seq2seq", "SEQ_2_SEQ_LM")]
)
def test_a_peft_model_replies_as_its_merged_model(request, prompts, architecture, task_type):
    name = "llama" if architecture == "causal" else "t5"
    base = request.getfixturevalue(name)
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    untouched = _generate(base, tokenizer, prompts, architecture)
    targets = ["q_proj", "v_proj"] if architecture == "causal" else ["q", "v"]
    config = LoraConfig(r=4, target_modules=targets, task_type=task_type, init_lora_weights=False)
    model = get_peft_model(base, config)
    replies = _generate(model, tokenizer, prompts, architecture)
    assert replies != untouched
    assert _generate(model.merge_and_unload(), tokenizer, prompts, architecture) == replies


def test_modes_gradients_and_requires_grad_are_left_as_they_were(llama, llama_tokenizer, prompts):
    llama.train()
    llama.model.layers[0].eval()
    before = [(module, module.training) for module in llama.modules()]
    _generate(llama, llama_tokenizer, prompts[:3])
    assert all(module.training == mode for module, mode in before)
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    assert torch.is_grad_enabled()


def test_dropout_is_off(t5, t5_tokenizer, prompts):
    expected = _generate(t5, t5_tokenizer, prompts, "seq2seq")
    assert _generate(t5.train(), t5_tokenizer, prompts, "seq2seq") == expected


def test_prompt_and_reply_share_the_context(llama, llama_tokenizer):
    prompts = ["a" * 119, "a" * 127, "a" * 300, "a"]
    replies = _generate(llama, llama_tokenizer, prompts)
    room = [128 - 120, 128 - 128, 0, TOKENS]
    assert [reply.tokens for reply in replies] == room
    assert {reply.stop_reason for reply in replies} == {"length"}
    assert replies[1].text == replies[2].text == ""


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0)])
@pytest.mark.parametrize("stop_strings", [(), ("e",)])
def test_a_nearly_full_prompt_takes_no_room_from_the_others(
    llama_tokenizer, learnt_positions, sampling, stop_strings
):
    """With learnt positions one beyond the context is an IndexError, whatever is cut later."""
    model, context = learnt_positions
    prompts = ["a" * (length - 1) for length in (35, 2, context, context - 1, 30, 24, 20)]
    options = {"max_new_tokens": 40, "sampling": sampling, "stop_strings": stop_strings}
    options["keys"] = [str(n) for n in range(len(prompts))]
    alone = _generate(model, llama_tokenizer, prompts, batch_size=1, **options)
    for batch_size in (2, 4, 8):
        assert _generate(model, llama_tokenizer, prompts, batch_size=batch_size, **options) == alone
    if sampling is None and not stop_strings:
        assert [reply.tokens for reply in alone] == [29, 40, 0, 1, 34, 40, 40]
        assert [reply.text for reply in alone] == [
            greedy_one_at_a_time(model, llama_tokenizer, prompt, reply.tokens)
            for prompt, reply in zip(prompts, alone, strict=True)
        ]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0)])
@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_logits_that_are_no_numbers_are_no_reply(request, prompts, architecture, sampling):
    """Their argmax would be token 0, or the first token that is not a number."""
    name = "llama" if architecture == "causal" else "t5"
    model, tokenizer = request.getfixturevalue(name), request.getfixturevalue(f"{name}_tokenizer")
    options = {"sampling": sampling, "keys": [f"test/{n}" for n in range(len(prompts))]}
    # Only the first prompt, the longest by far, has this letter.
    prompts = ["Z" * 90, *prompts[1:]]
    place = tokenizer.convert_tokens_to_ids("Z")
    model.get_input_embeddings().weight.data[place] = torch.nan
    for batch_size in (1, 8):
        with pytest.raises(NonFiniteError, match=r"reply test/0: .* for token 1 of the reply"):
            _generate(model, tokenizer, prompts, architecture, batch_size, **options)
    with pytest.raises(NonFiniteError, match=r"^prompt 0:"):
        _generate(model, tokenizer, prompts, architecture)


def test_what_comes_after_the_end_of_a_reply_need_not_be_a_number(
    llama, llama_tokenizer, prompts, llama_texts
):
    """A row that has ended is decoded as long as others go on; nobody reads what comes out."""
    _end_replies_at_a_common_letter(llama, llama_tokenizer, llama_texts)
    expected = _generate(llama, llama_tokenizer, prompts)
    llama.get_input_embeddings().weight.data[0] = torch.nan  # the padding id, fed to ended rows
    assert len({reply.tokens for reply in expected}) > 2
    assert _generate(llama, llama_tokenizer, prompts, batch_size=1) == expected


def test_every_batch_is_handed_over_as_it_is_made(llama, llama_tokenizer, prompts):
    seen = []
    replies = _generate(
        llama,
        llama_tokenizer,
        prompts,
        batch_size=5,
        on_replies=lambda places, made: seen.append(dict(zip(places, made, strict=True))),
    )
    assert [len(batch) for batch in seen] == [5, 5, 3]
    assert {place: reply for batch in seen for place, reply in batch.items()} == dict(
        enumerate(replies)
    )
    assert _generate(llama, llama_tokenizer, []) == []


def test_bad_arguments_are_errors(llama, llama_tokenizer):
    with pytest.raises(InputError, match="batch_size=0"):
        _generate(llama, llama_tokenizer, ["x"], batch_size=0)
    with pytest.raises(InputError, match="max_new_tokens=0"):
        _generate(llama, llama_tokenizer, ["x"], max_new_tokens=0)
    with pytest.raises(InputError, match="one key a prompt"):
        _generate(llama, llama_tokenizer, ["x"], sampling=Sampling(1.0))
    with pytest.raises(InputError, match="architecture='encoder'; valid: causal, seq2seq"):
        _generate(llama, llama_tokenizer, ["x"], architecture="encoder")


def test_the_embedded_model_replies_the_same_at_every_batch_size(arithmetic_examples):
    folder = Path(__file__).resolve().parents[2] / "data" / "tiny_llama"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the embedded model is not in data/tiny_llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [example.prompt for example in arithmetic_examples]
    one, eight, all_at_once = (
        _generate(model, tokenizer, prompts, batch_size=size, stop_strings=["\nQ:"])
        for size in (1, 8, 64)
    )
    assert one == eight == all_at_once
