from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def real_gsm8k() -> Path:
    folder = REPOSITORY.parent / "shared" / "data" / "gsm8k"
    if not folder.is_dir():
        pytest.skip("the real GSM8K rows are not in shared/data/gsm8k beside the repository")
    return folder


@pytest.fixture(scope="session")
def real_meta_math() -> Path:
    file = REPOSITORY.parent / "shared" / "data" / "metamathqa" / "sample_rows.json"
    if not file.is_file():
        pytest.skip("the MetaMathQA sample is not in shared/data/metamathqa beside the repository")
    return file


@pytest.fixture(scope="session")
def real_data():
    """Return a folder of real rows, or skip."""

    def folder(name: str) -> Path:
        path = REPOSITORY.parent / "shared" / "data" / name
        if not path.is_dir():
            pytest.skip(f"the real rows are not in shared/data/{name} beside the repository")
        return path

    return folder


@pytest.fixture(scope="session")
def make_tokenizer():
    """One token a byte, except that " 4" is merged: a border between ":" and " 4" is a trap."""

    def make(template: str = "$A", *, pad: bool = True, eos: bool = True):
        specials = ["<pad>", "<s>", "</s>"]
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate([*specials, *letters, "Ġ4"])}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("Ġ", "4")]))
        # Without the regular expression nothing is cut before the merges, as in SentencePiece.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=specials[0] if pad else None,
            bos_token=specials[1],
            eos_token=specials[2] if eos else None,
        )

    return make
