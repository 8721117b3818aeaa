"""Names of full blocks: a hash chain over their tokens. Shared by engines and routers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_SIZE = 16
"""Bytes of a hash; 128 bits make a collision, even a sought one, out of reach."""


def root_hash(salt: str | None = None) -> bytes:
    """Parent of a sequence's first block; a different salt gives a disjoint family of chains."""
    if salt is None:
        return bytes(DIGEST_SIZE)
    return blake2b(salt.encode(), digest_size=DIGEST_SIZE).digest()


def extend_block_hashes(
    hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: str | None = None
) -> None:
    """Append the hashes of those full blocks of `token_ids` that `hashes` does not name yet.

    A block's hash covers its tokens and, through its parent's hash, every token before it and the
    salt. So equal hashes mean equal keys and values.

    Args:
        hashes: hashes of the first `len(hashes)` blocks of the same sequence; extended in place.
        token_ids: all tokens of the sequence.
        block_size: tokens in a block.
        salt: keeps apart requests that must not share blocks.
    """
    pack = struct.Struct(f"<{block_size}q").pack
    parent = hashes[-1] if hashes else root_hash(salt)
    first, end = len(hashes) * block_size, len(token_ids) - block_size + 1
    for start in range(first, end, block_size):
        tokens = pack(*token_ids[start : start + block_size])
        parent = blake2b(parent + tokens, digest_size=DIGEST_SIZE).digest()
        hashes.append(parent)


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str | None = None) -> list[bytes]:
    """Hashes of all full blocks of a sequence; see `extend_block_hashes`."""
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, block_size, salt)
    return hashes
