"""Ref-counted blocks of the KV cache, kept hit-able by hash until they are reused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.errors import TrunklineError

NULL_BLOCK = 0
"""Padded rows write here; it is never handed out."""


class InvariantViolation(TrunklineError, RuntimeError):
    """The engine's own bookkeeping contradicts itself: a bug, never a user's error."""


class BlockPool:
    """Hands out blocks 1 … num_blocks - 1.

    A block is in one of three places: *used* (referenced), *cached* (unreferenced, its hash still
    known) or *empty*. Empty blocks are handed out first, then the least recently freed cached one.
    """

    def __init__(self, num_blocks: int, enable_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self.reset()

    def reset(self) -> None:
        """Forget every reference and every hash."""
        self._empty = list(range(self.num_blocks - 1, NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently freed first
        self._ref_counts = [0] * self.num_blocks
        self._hashes: list[bytes | None] = [None] * self.num_blocks
        self._blocks: dict[bytes, int] = {}

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that can be handed out at all."""
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` could hand out now, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that is referenced, 0 to 1."""
        return 1.0 - self.num_free_blocks / max(1, self.num_usable_blocks)

    def ref_count(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._ref_counts[block]

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` count as free until touched."""
        return sum(not self._ref_counts[block] for block in blocks)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each; None, and nothing taken, if too few."""
        if count > self.num_free_blocks:
            return None
        taken = [self._empty.pop() if self._empty else self._evict_oldest() for _ in range(count)]
        for block in taken:
            self._ref_counts[block] = 1
        return taken

    def touch(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each block that `lookup` found."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._cached[block]
            self._ref_counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each of a sequence's blocks, given from head to tail.

        The tail counts as freed before the head: it is evicted first, so the prefix stays whole.

        Raises:
            InvariantViolation: a block is not referenced.
        """
        for block in reversed(blocks):
            left = self._ref_counts[block] - 1
            if left < 0:
                raise InvariantViolation(f"block {block} is freed but not referenced")
            self._ref_counts[block] = left
            if left:
                continue
            if self._hashes[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a referenced block hit-able; the first block of a hash keeps the name."""
        if not self.enable_caching or self._hashes[block] is not None:
            return
        if self._blocks.setdefault(block_hash, block) == block:
            self._hashes[block] = block_hash

    def lookup(self, block_hash: bytes) -> int | None:
        """The block that holds these tokens, if any."""
        return self._blocks.get(block_hash)

    def _evict_oldest(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._blocks[block_hash]
            self._hashes[block] = None
        return block

    def check_invariants(self) -> None:
        """Check that every block is in exactly one place and the hash map agrees both ways.

        Raises:
            InvariantViolation: they do not; the sentence names the blocks.
        """
        empty, cached = set(self._empty), set(self._cached)
        used = {block for block, count in enumerate(self._ref_counts) if count}
        _require(len(empty) == len(self._empty), "the empty list holds a block twice", empty)
        _require(not used & (empty | cached), "blocks are both free and referenced", used)
        _require(not empty & cached, "blocks are both empty and cached", empty & cached)
        missing = set(range(1, self.num_blocks)) ^ (empty | cached | used)
        _require(not missing, "free + used + cached is not all blocks; off are", missing)
        hashed = {block for block, name in enumerate(self._hashes) if name is not None}
        _require(cached <= hashed, "cached blocks have no hash", cached - hashed)
        _require(not hashed & empty, "empty blocks have a hash", hashed & empty)
        named = {block for name, block in self._blocks.items() if self._hashes[block] == name}
        agree = named == hashed and len(self._blocks) == len(hashed)
        _require(agree, "the hash map and the blocks' hashes disagree on", named ^ hashed)


def _require(holds: bool, complaint: str, blocks: set[int]) -> None:
    if not holds:
        raise InvariantViolation(f"KV cache: {complaint}: {sorted(blocks)}")
