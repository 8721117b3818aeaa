"""A tokenizer for a model shape, which has none: every id stands for text of a realistic length.

Dummy weights make any token; a server can only stream what decodes to text. The vocabulary here is
synthetic and the same on every machine: all bytes, `conversations.WORDS` after a space, random
words, Chinese characters and cut ones. Its proportions are like those of vocabularies for many
languages; its words mean nothing.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.models import find_model, find_shape
from benchmarks.serving.conversations import WORDS

_LETTERS = "eeeeeetttttaaaaooooiiiinnnnsssshhhrrrddllluuccmmwwffggyyppbbvkjxqz"
"""About as often as in English text."""
_SIZES = (1, 2, 3, 4, 5, 6)
_SIZE_WEIGHTS = (4, 10, 26, 30, 20, 10)
"""How many of 100 words have how many letters."""
_SPACE_SHARE = 0.5
"""Of words that begin with a space, and so begin a word of a text."""
_CHARACTER_SHARE = 0.1
_CUT_SHARE = 0.005
"""Of tokens that end within a character; text must wait for the tokens after them."""
_CHARACTERS = (0x4E00, 0x9FFF)
"""CJK Unified Ideographs, three bytes each in UTF-8 (20,992 of them)."""


def write_model(shape: Path, folder: Path) -> Path:
    """Copy a shape's `config.json` to `folder`, and put a tokenizer beside it.

    Returns:
        `folder`, which the engine and its server take for a model when weights are dummy ones.

    Raises:
        ValueError: the vocabulary is too small, see `build_tokenizer`.
    """
    config = json.loads((shape / "config.json").read_text())
    special = {
        name: f"<|{name}|>"
        for name in ("bos_token", "eos_token")
        if isinstance(config.get(f"{name}_id"), int)
    }
    ids = {text: int(config[f"{name}_id"]) for name, text in special.items()}
    tokenizer = build_tokenizer(int(config["vocab_size"]), ids)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(shape / "config.json", folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def model_with_tokenizer(name: str, folder: Path) -> str:
    """Where the model called `name` lies; a shape is written to `folder`, which must be empty.

    Raises:
        FileNotFoundError: there is no such model here.
    """
    shape = find_shape(name)
    return find_model(name) if shape is None else str(write_model(shape, folder))


def build_tokenizer(vocab_size: int, special: dict[str, int] | None = None) -> Tokenizer:
    """Build a byte-level tokenizer of exactly `vocab_size` tokens.

    Text that is in the vocabulary as one word of GPT-2's pattern is one token; anything else is a
    token a byte, so that every text comes back as it was.

    Args:
        vocab_size: number of ids, 0 to `vocab_size - 1`.
        special: text → id of special tokens.

    Raises:
        ValueError: there is no room for all bytes and words, or a special id is outside.
    """
    special = special or {}
    fixed = [*_byte_strings(), *(f"Ġ{word}" for word in dict.fromkeys(WORDS))]
    room = vocab_size - len(special)
    if room < len(fixed) or any(not 0 <= i < vocab_size for i in special.values()):
        raise ValueError(
            f"a vocabulary of {vocab_size} is too small: give the shape a vocab_size of "
            f"{len(fixed) + len(special)} or more, and special ids below it"
        )
    reserved = set(special.values())
    free = (token_id for token_id in range(vocab_size) if token_id not in reserved)
    texts = _distinct(fixed, room)
    vocabulary = special | dict(zip(texts, free, strict=True))
    tokenizer = Tokenizer(_bpe(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return tokenizer


def _bpe(vocabulary: dict[str, int]) -> Any:
    """BPE without merges: a word that is a token stays whole, another falls into bytes."""
    return models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)


def _distinct(fixed: list[str], count: int) -> Iterator[str]:
    """`fixed` and then random tokens, `count` in all and none twice, in GPT-2's alphabet."""
    rng, alphabet = random.Random(0), _byte_strings()
    seen = set(fixed)
    yield from fixed
    while len(seen) < count:
        text = "".join(alphabet[byte] for byte in _draw(rng))
        if text not in seen:
            seen.add(text)
            yield text


def _draw(rng: random.Random) -> bytes:
    """One token: a word, a character, or the beginning of one."""
    kind = rng.random()
    if kind < _CHARACTER_SHARE + _CUT_SHARE:
        character = chr(rng.randint(*_CHARACTERS)).encode()
        return character if kind < _CHARACTER_SHARE else character[:2]
    size = rng.choices(_SIZES, _SIZE_WEIGHTS)[0]
    word = "".join(rng.choices(_LETTERS, k=size))
    return f" {word}".encode() if rng.random() < _SPACE_SHARE else word.encode()


def _byte_strings() -> list[str]:
    """The character for each byte in GPT-2's alphabet (Radford et al. 2019, encoder.py): printable
    bytes of Latin-1 are themselves, the n-th of the others is the character 256 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + hidden.index(b)) for b in range(256)]
