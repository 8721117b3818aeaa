"""What an engine's prefix cache is likely to hold, as far as this process can know."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from engine.kv_cache.hashing import extend_block_hashes
from engine.request import EngineRequest

ROUTING_BLOCK = 128
"""Tokens in a block of the index, whatever the engines' own blocks are: all processes can agree on
it before they know an engine, and with blocks of 16 tokens most of the time spent on routing would
go into hashing. An overlap that this misses takes an engine milliseconds to compute."""
USUAL_CAPACITY = 2**20
"""Tokens taken for the size of a cache whose engine has not reported it yet."""


def request_blocks(request: EngineRequest, known: Sequence[bytes] = ()) -> list[bytes]:
    """Hashes of the full blocks of a request's tokens, its output so far included.

    Args:
        request: not changed.
        known: hashes of its first blocks, from an earlier call.
    """
    blocks = list(known)
    tokens = request.prompt_token_ids
    if request.output_token_ids:
        tokens = tokens + request.output_token_ids
    extend_block_hashes(blocks, tokens, ROUTING_BLOCK, request.cache_salt)
    return blocks


class PrefixIndex:
    """Hashes of the blocks that went to one engine last, as many as its cache has room for.

    Forgets what was used longest ago, as the engine does. Of a sequence the tail counts as used
    before the head. So a block is never forgotten before those that follow it, and what is known of
    a sequence always is its beginning.
    """

    def __init__(self, capacity: int = USUAL_CAPACITY) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()  # least recently used first
        self.resize(capacity)

    def __len__(self) -> int:
        return len(self._blocks)

    def resize(self, capacity: int) -> None:
        """Take over the size of the engine's cache, in tokens."""
        self._max_blocks = capacity // ROUTING_BLOCK
        self._trim()

    def overlap(self, blocks: Sequence[bytes]) -> int:
        """Tokens at the beginning of a sequence that the cache is likely to hold.

        Takes O(log n) for a sequence of n blocks.
        """
        known = self._blocks
        if not blocks or blocks[0] not in known:  # as on most engines
            return 0
        return ROUTING_BLOCK * bisect_left(blocks, True, key=lambda block: block not in known)

    def use(self, blocks: Sequence[bytes]) -> None:
        """Note that the engine has computed a sequence, or is about to; given from its first block.

        Takes O(n).
        """
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        self._trim()

    def _trim(self) -> None:
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
