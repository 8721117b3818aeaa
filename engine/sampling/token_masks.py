"""Masks over the vocabulary: which tokens some of a batch's rows may draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_TERMS = torch.tensor(
    [[0.0 if octet >> bit & 1 else -torch.inf for bit in range(8)] for octet in range(256)]
)
"""What is added to the logits of eight tokens, by the octet that stands for them in a mask."""


@dataclass(slots=True)
class TokenMasks:
    """Masks of some rows, on the host; the others may draw any token."""

    places: list[int]
    """Of the masked rows in the batch."""
    packed: torch.Tensor
    """`bits` and, after them, `places`: int32 in one piece, so that one copy brings both to the
    device."""
    vocab_size: int

    @classmethod
    def allocate(cls, places: list[int], vocab_size: int, pin_memory: bool = False) -> TokenMasks:
        """Masks whose `bits` are still to be set.

        Args:
            places: of the masked rows.
            vocab_size: width of the logits.
            pin_memory: for the copy to a GPU, which does not wait for the steps in flight then.
        """
        words = len(places) * math.ceil(vocab_size / 32)
        packed = torch.empty(words + len(places), dtype=torch.int32, pin_memory=pin_memory)
        packed[words:] = torch.tensor(places, dtype=torch.int32)
        return cls(places, packed, vocab_size)

    @property
    def bits(self) -> torch.Tensor:
        """int32 [masked rows, ceil(vocab / 32)]; token t is allowed if bit t % 32 of word t // 32
        is set."""
        return self.packed[: -len(self.places)].view(len(self.places), -1)

    def apply(self, logits: torch.Tensor) -> None:
        """Set the logits [batch, vocab] of tokens that are not allowed to -inf, in place.

        Args:
            logits: contiguous float32, on the CPU or a GPU.
        """
        if logits.device.type == "cuda":
            from engine.kernels.token_masks import apply_token_masks

            packed = self.packed.to(logits.device, non_blocking=True)
            apply_token_masks(logits, packed, len(self.places))
            return
        # Sums take a tenth of the time of filling in by a mask.
        for place, octets in zip(self.places, self.bits.view(torch.uint8).int(), strict=True):
            terms = _TERMS.index_select(0, octets).view(-1)
            logits[place].add_(terms[: self.vocab_size])
