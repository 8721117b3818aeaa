"""Gives requests their blocks, those whose tokens are cached first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from engine.kv_cache.block_pool import BlockPool, InvariantViolation
from engine.kv_cache.hashing import extend_block_hashes
from engine.request import Request


class BlockAllocator:
    """Keeps the block tables of requests and names their blocks in the prefix cache.

    A block is named as soon as the step that computes its last token is planned. Requests of the
    same step may hit it, which rests on a step writing all its keys before it attends
    (`AttentionBackend`) and on steps executing in order.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, enable_caching)

    def can_share(self, request: Request) -> bool:
        """Whether the request may start from cached blocks.

        Not one that wants log-probabilities of its prompt, or the mean of its hidden states: they
        come only with computing it.
        """
        return self.pool.enable_caching and not request.computes_whole_prompt

    def match_prefix(self, request: Request) -> list[int]:
        """Cached blocks that hold the head of the request's tokens.

        At least one token is left to compute: sampling needs its hidden state.
        """
        if not self.can_share(request):
            return []
        self._extend_hashes(request)
        blocks: list[int] = []
        limit = (len(request.token_ids) - 1) // self.block_size
        for block_hash in islice(request.block_hashes, limit):
            block = self.pool.lookup(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def admit(self, request: Request, spare: int = 0) -> bool:
        """Give a request blocks for all its known tokens, or none of them if they do not fit.

        `spare` blocks must stay free. Sets `num_computed_tokens` to what the cache holds already.
        """
        hits = self.match_prefix(request)
        count = -(-len(request.token_ids) // self.block_size) - len(hits)
        if count + spare > self.pool.num_free_blocks - self.pool.num_unreferenced(hits):
            return False
        self.pool.touch(hits)
        request.block_ids = hits + (self.pool.allocate(count) or [])
        request.num_computed_tokens = len(hits) * self.block_size
        request.num_registered_blocks = len(hits)
        return True

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Extend the block table to `num_tokens` tokens; returns the new blocks.

        None, and nothing changed, when too few blocks are free.
        """
        added = self.pool.allocate(-(-num_tokens // self.block_size) - len(request.block_ids))
        if added is not None:
            self.register(request)
            request.block_ids += added
        return added

    def register(self, request: Request) -> None:
        """Name the request's full blocks whose tokens are known and computed, or about to be."""
        if not self.pool.enable_caching:
            return
        full = min(request.num_computed_tokens, len(request.token_ids)) // self.block_size
        if full <= request.num_registered_blocks:
            return
        self._extend_hashes(request)
        for index in range(request.num_registered_blocks, full):
            self.pool.register(request.block_ids[index], request.block_hashes[index])
        request.num_registered_blocks = full

    def release(self, request: Request) -> None:
        """Take back all blocks; those that were full stay hit-able."""
        self.register(request)
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_registered_blocks = 0

    def wasted_by_preempting(self, request: Request) -> int:
        """Computed tokens that a preemption would lose.

        Blocks that another request holds too will be hit again. Blocks that would merely stay
        hit-able count as lost: no others are left, so they are the next to be reused.
        """
        kept = 0
        for own, block_hash in zip(request.block_ids, request.block_hashes, strict=False):
            block = self.pool.lookup(block_hash)
            if block is None or self.pool.ref_count(block) <= (block == own):
                break
            kept += self.block_size
        return max(0, request.num_computed_tokens - kept)

    def frees_blocks(self, request: Request) -> bool:
        """Whether the request holds a block that nobody shares."""
        return any(self.pool.ref_count(block) == 1 for block in reversed(request.block_ids))

    def check_invariants(self, holders: Sequence[Request]) -> None:
        """Check the pool, and that references are exactly those of `holders`.

        Raises:
            InvariantViolation: they are not.
        """
        self.pool.check_invariants()
        held = Counter(block for request in holders for block in request.block_ids)
        for block in range(self.pool.num_blocks):
            if held[block] != self.pool.ref_count(block):
                raise InvariantViolation(
                    f"block {block} has {self.pool.ref_count(block)} references, but "
                    f"{held[block]} requests hold it"
                )

    def _extend_hashes(self, request: Request) -> None:
        extend_block_hashes(
            request.block_hashes, request.token_ids, self.block_size, request.cache_salt
        )
