"""The block pool against a naive model that keeps one list in order of freeing."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.kv_cache.block_pool import BlockPool, InvariantViolation


class NaivePool:
    """Every question is answered by a search through plain lists."""

    def __init__(self, num_blocks: int) -> None:
        self.refs = dict.fromkeys(range(1, num_blocks), 0)
        self.names: dict[int, str] = {}
        self.freed: list[int] = []  # unreferenced blocks with a name, oldest first

    def free_blocks(self) -> list[int]:
        return [block for block, count in self.refs.items() if count == 0]

    def take(self, blocks: list[int]) -> None:
        """Check a choice that the real pool made, then follow it."""
        for block in blocks:
            assert self.refs[block] == 0
            if block in self.names:
                unnamed = [b for b in self.free_blocks() if b not in self.names]
                assert not unnamed, "a cached block was reused while an empty one was left"
                assert block == self.freed.pop(0), "not the least recently freed"
                del self.names[block]
            self.refs[block] = 1

    def touch(self, block: int) -> None:
        if self.refs[block] == 0:
            self.freed.remove(block)
        self.refs[block] += 1

    def free(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0 and block in self.names:
                self.freed.append(block)

    def register(self, block: int, name: str) -> None:
        if block not in self.names and name not in self.names.values():
            self.names[block] = name

    def lookup(self, name: str) -> int | None:
        return next((block for block, n in self.names.items() if n == name), None)


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 9))
    def start(self, num_blocks):
        self.pool, self.naive = BlockPool(num_blocks), NaivePool(num_blocks)
        self.sequences: list[list[int]] = []

    @rule(count=st.integers(0, 5))
    def allocate(self, count):
        blocks = self.pool.allocate(count)
        if count > len(self.naive.free_blocks()):
            assert blocks is None
            return
        assert len(blocks) == count
        self.naive.take(blocks)
        self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data):
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        blocks = self.sequences.pop(index)
        self.pool.free(blocks)
        self.naive.free(blocks)

    @precondition(lambda self: any(self.sequences))
    @rule(data=st.data(), name=st.sampled_from("abcdef"))
    def register(self, data, name):
        block = data.draw(st.sampled_from(sorted({b for s in self.sequences for b in s})))
        self.pool.register(block, name.encode())
        self.naive.register(block, name)

    @rule(names=st.lists(st.sampled_from("abcdef"), max_size=4, unique=True))
    def hit(self, names):
        found = [self.pool.lookup(name.encode()) for name in names]
        assert found == [self.naive.lookup(name) for name in names]
        blocks = [block for block in found if block is not None]
        idle = [block for block in blocks if self.naive.refs[block] == 0]
        assert self.pool.num_unreferenced(blocks) == len(idle)
        self.pool.touch(blocks)
        for block in blocks:
            self.naive.touch(block)
        self.sequences.append(blocks)

    @rule()
    def reset(self):
        self.pool.reset()
        self.naive = NaivePool(self.pool.num_blocks)
        self.sequences = []

    @invariant()
    def agrees(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        free = len(self.naive.free_blocks())
        assert self.pool.num_free_blocks == free
        assert self.pool.usage == pytest.approx(1 - free / max(1, len(self.naive.refs)))
        for block, count in self.naive.refs.items():
            assert self.pool.ref_count(block) == count


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


def named_pool(num_blocks: int, names: str) -> tuple[BlockPool, list[int]]:
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.register(block, name.encode())
    return pool, blocks


def test_the_null_block_is_never_handed_out():
    pool = BlockPool(4)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    assert pool.allocate(1) is None


def test_a_tail_is_evicted_before_its_head():
    pool, blocks = named_pool(4, "abc")
    pool.free(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert [pool.lookup(name) for name in (b"a", b"b", b"c")] == [blocks[0], blocks[1], None]


def test_empty_blocks_go_before_cached_ones():
    pool, blocks = named_pool(5, "ab")
    pool.free(blocks)
    pool.allocate(2)
    assert pool.lookup(b"a") == blocks[0]


def test_a_touched_block_survives():
    pool, (first, second) = named_pool(3, "ab")
    pool.free([first])
    pool.touch([first])
    pool.free([second])
    assert pool.allocate(1) == [second]
    assert pool.lookup(b"a") == first


def test_the_first_block_keeps_a_name():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.register(first, b"a")
    pool.register(second, b"a")
    pool.free([second])
    assert pool.lookup(b"a") == first
    pool.check_invariants()


def test_nothing_is_named_without_caching():
    pool = BlockPool(4, enable_caching=False)
    pool.register(pool.allocate(1)[0], b"a")
    assert pool.lookup(b"a") is None


def test_a_second_free_is_refused():
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(InvariantViolation, match="not referenced"):
        pool.free(blocks)


CORRUPTIONS = {
    "twice": lambda pool: pool._empty.append(pool._empty[0]),
    "both free and referenced": lambda pool: pool._ref_counts.__setitem__(pool._empty[0], 1),
    "not all blocks": lambda pool: pool._empty.pop(),
    "have no hash": lambda pool: pool._cached.__setitem__(pool._empty.pop(), None),
    "empty blocks have a hash": lambda pool: pool._hashes.__setitem__(pool._empty[0], b"x"),
    "disagree": lambda pool: pool._blocks.__setitem__(b"x", 1),
}


@pytest.mark.parametrize("complaint", CORRUPTIONS)
def test_corruption_is_named(complaint):
    pool, blocks = named_pool(8, "abc")
    pool.free(blocks[1:])
    pool.check_invariants()
    CORRUPTIONS[complaint](pool)
    with pytest.raises(InvariantViolation, match=complaint):
        pool.check_invariants()
