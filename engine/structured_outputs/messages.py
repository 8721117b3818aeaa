"""What an engine and the processes of its grammars tell each other; msgpack, one frame each."""

from __future__ import annotations

import enum

import msgspec

from engine.structured_outputs.params import GrammarSource


class Setup(msgspec.Struct):
    """Whose tokens are masked, and within which limits: passed to the first process as JSON."""

    model: str
    """See `EngineConfig.model`; its tokenizer is loaded."""
    width: int
    """Of the logits."""
    eos_token_ids: tuple[int, ...]
    compile_cpu_s: float = 10.0
    """Processor time for compiling a grammar and its first mask."""
    mask_cpu_s: float = 0.25
    """Processor time that masks may take at once. It is spent and earned: who computes for long at
    every token would slow down all other requests of a batch."""


class RowState(msgspec.Struct, array_like=True):
    """A matcher whose next mask is wanted."""

    matcher_id: int
    tokens: list[int]
    """Output tokens since the last time."""
    unwanted: list[int]
    """Tokens to mask as well, unless no other is allowed."""


class MaskRequest(msgspec.Struct, array_like=True):
    """Asks for masks, in the shared memory. Answered by a `RowStatus` byte a row."""

    rows: list[RowState]
    ended: list[int]
    """Matchers that nobody needs any more."""


class RowStatus(enum.IntEnum):
    """What became of a row."""

    MASKED = 0
    REJECTED = 1
    """The grammar does not allow one of the tokens so far."""
    DEAD_END = 2
    """No token of the vocabulary goes on, and none ends the output."""


encode = msgspec.msgpack.Encoder().encode
decode_source = msgspec.msgpack.Decoder(GrammarSource).decode
decode_request = msgspec.msgpack.Decoder(MaskRequest).decode
