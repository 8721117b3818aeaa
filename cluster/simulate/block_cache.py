"""The blocks of an engine's KV cache, by name."""

from __future__ import annotations

from collections import OrderedDict

from cluster.simulate.chats import Request


class BlockCache:
    """Follows `engine.kv_cache`: what is not referenced stays known until its memory is needed.

    One thing is simpler: a request takes the blocks of its output when it begins. So none is
    preempted; where blocks are short, the real engine begins more requests and sends some back.

    Args:
        num_blocks: that can be used.
        block_size: tokens in a block.
        headroom: blocks that an admission leaves to those that run.
    """

    def __init__(self, num_blocks: int, block_size: int, headroom: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._headroom = headroom
        self._references: dict[bytes, int] = {}
        self._cached: OrderedDict[bytes, None] = OrderedDict()  # least recently freed first
        self._num_unnamed = 0

    @property
    def num_free(self) -> int:
        """Blocks that a request could take, cached ones included."""
        return self.num_blocks - len(self._references) - self._num_unnamed

    def admit(self, request: Request, alone: bool) -> bool:
        """Give a request its blocks, cached ones first, or none if they do not fit.

        Args:
            request: gets `num_cached`, and its blocks.
            alone: whether nothing runs, so that no headroom is needed.
        """
        size, references, cached = self.block_size, self._references, self._cached
        names = request.chat.blocks(size, request.num_prompt)
        limit, hits, idle = (request.num_prompt - 1) // size, 0, 0
        for name in names[:limit]:
            if name in cached:
                idle += 1
            elif name not in references:
                break
            hits += 1
        needed = -(-request.num_tokens // size) - hits
        if needed + (0 if alone else self._headroom) > self.num_free - idle:
            return False
        request.num_cached = hits * size
        self._hold(request, names, hits, needed)
        return True

    def _hold(self, request: Request, names: list[bytes], hits: int, needed: int) -> None:
        """Reference the blocks found, and name those of the prompt that nobody has."""
        references, cached = self._references, self._cached
        held = names[:hits]
        for name in held:
            if name in cached:
                del cached[name]
            references[name] = references.get(name, 0) + 1
        for name in names[hits:]:
            if name not in references:
                cached.pop(name, None)  # its beginning had been evicted or may not be shared
                references[name] = 1
                held.append(name)
        request.held = held
        request.num_unnamed = needed - (len(held) - hits)
        self._num_unnamed += request.num_unnamed
        self._evict()

    def release(self, request: Request) -> None:
        """Take back the blocks of a request that has ended; they can be found until reused."""
        references, cached = self._references, self._cached
        self._num_unnamed -= request.num_unnamed
        for name in request.held or ():
            references[name] -= 1
        for name in reversed(request.chat.blocks(self.block_size, request.num_tokens - 1)):
            left = references.get(name)
            if left == 0:
                del references[name]
            if not left:
                cached[name] = None
                cached.move_to_end(name)
        self._evict()

    def _evict(self) -> None:
        cached = self._cached
        excess = len(cached) - self.num_free
        for _ in range(excess):
            cached.popitem(last=False)
