"""The bytes that each token stands for, whatever scheme its vocabulary is written in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import tokenizers

from engine.errors import ConfigError

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""SentencePiece's tokens for single bytes."""


class TokenBytes(dict[int, bytes]):
    """Token id → bytes, filled on first use; ids beyond the vocabulary stand for nothing.

    Decoding by bytes makes incremental decoding exact and cheap: tokens concatenate, and only UTF-8
    has state. A tokenizer's own `decode` works on whole sequences.

    Args:
        backend: the tokenizer.

    Attributes:
        strips_space: whether one space at the start of a text is left out.

    Raises:
        ConfigError: the tokenizer's decoder is of a kind not known here.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._text_of: Callable[[int], str | None] = backend.id_to_token
        self._added = frozenset(backend.get_added_tokens_decoder())
        steps = _decoder_steps(backend.decoder)
        self._to_bytes = _token_to_bytes(steps)
        self.strips_space = any(map(_strips_space, steps)) or not steps

    def __missing__(self, token_id: int) -> bytes:
        text = self._text_of(token_id) if 0 <= token_id < 2**32 else None
        if text is None:
            return b""
        value = text.encode() if token_id in self._added else self._to_bytes(text)
        self[token_id] = value
        return value


class SkippingTokenBytes(dict[int, bytes]):
    """`TokenBytes` in which special tokens stand for nothing."""

    def __init__(self, all_bytes: TokenBytes, special_ids: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(special_ids, b""))
        self._all_bytes = all_bytes

    def __missing__(self, token_id: int) -> bytes:
        value = self._all_bytes[token_id]
        if value:  # an id beyond the vocabulary takes no room
            self[token_id] = value
        return value


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """Parameters of a decoder's steps, as in tokenizer.json."""
    if decoder is None:
        return []
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    for step in steps:
        if not _known(step):
            raise ConfigError(
                f"the tokenizer's decoder {json.dumps(step)} is not supported; "
                "use a byte-level BPE or a SentencePiece tokenizer."
            )
    return steps


def _known(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "ByteLevel" | "ByteFallback" | "Fuse"}:
            return True
        case {"type": "Metaspace", "replacement": mark}:
            return bool(mark == SPACE_MARK)
        case {"type": "Replace", "pattern": {"String": mark}, "content": " "}:
            return bool(mark == SPACE_MARK)
        case {"type": "Strip", "content": " ", "stop": 0}:
            return bool(step["start"] in (0, 1))
    return False


def _strips_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return bool(step["type"] == "Strip" and step["start"] == 1)


def _token_to_bytes(steps: list[dict[str, Any]]) -> Callable[[str], bytes]:
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level()
    if not steps:  # words, which are joined by spaces
        return lambda text: b" " + text.encode()
    spaces = bool(kinds & {"Replace", "Metaspace"})
    fallback = "ByteFallback" in kinds

    def sentencepiece(text: str) -> bytes:
        if fallback and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        return (text.replace(SPACE_MARK, " ") if spaces else text).encode()

    return sentencepiece


def _byte_level() -> Callable[[str], bytes]:
    """GPT-2's alphabet (Radford et al. 2019, encoder.py): a printable byte of Latin-1 is itself,
    the n-th of the others is the character 256 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + n): byte for n, byte in enumerate(hidden)}

    def byte_level(text: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in text])
        except KeyError:  # a token that is not in the alphabet is plain text
            return text.encode()

    return byte_level
