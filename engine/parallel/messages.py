"""What the first rank tells the others before each step."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from engine.sampling.token_masks import TokenMasks
from engine.step import StepPlan


class Masks(msgspec.Struct, array_like=True):
    """A `TokenMasks`."""

    places: list[int]
    packed: bytes
    vocab_size: int

    @classmethod
    def of(cls, masks: TokenMasks | None) -> Masks | None:
        """The masks as bytes."""
        if masks is None:
            return None
        return cls(masks.places, masks.packed.numpy().tobytes(), masks.vocab_size)

    def restore(self, pin_memory: bool) -> TokenMasks:
        """The masks again.

        Args:
            pin_memory: for the copy to a GPU.
        """
        packed = torch.frombuffer(bytearray(self.packed), dtype=torch.int32)
        return TokenMasks(
            self.places, packed.pin_memory() if pin_memory else packed, self.vocab_size
        )


_encode = msgspec.msgpack.Encoder().encode
_PLAN, _MASKS = b"p", b"m"
_plans = msgspec.msgpack.Decoder(StepPlan)
_masks = msgspec.msgpack.Decoder(Masks | None)


def encode_plan(plan: StepPlan) -> bytes:
    """A plan for `decode`."""
    return _PLAN + _encode(plan)


def encode_masks(masks: TokenMasks | None) -> bytes:
    """Masks for `decode`."""
    return _MASKS + _encode(Masks.of(masks))


def decode(message: bytes) -> StepPlan | Masks | None:
    """What a message holds."""
    kind, body = message[:1], memoryview(message)[1:]
    found: Any = (_plans if kind == _PLAN else _masks).decode(body)
    return found  # type: ignore[no-any-return]
