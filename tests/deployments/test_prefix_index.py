from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.prefix_index import ROUTING_BLOCK, PrefixIndex, request_blocks
from engine.kv_cache.hashing import block_hashes
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams


def request(tokens: list[int], salt: str | None = None, output: tuple[int, ...] = ()):
    params = SamplingParams(seed=0)
    return EngineRequest("r", tokens, params, cache_salt=salt, output_token_ids=list(output))


def chain(*parts: int) -> list[bytes]:
    """Blocks of a sequence of which each block repeats one token."""
    return request_blocks(request([part for part in parts for _ in range(ROUTING_BLOCK)]))


def capacity(num_blocks: int) -> int:
    return num_blocks * ROUTING_BLOCK


def test_blocks_are_the_engines_own_hashes_and_grow_with_the_output():
    tokens = list(range(2 * ROUTING_BLOCK + 5))
    blocks = request_blocks(request(tokens, "salt"))
    assert blocks == block_hashes(tokens, ROUTING_BLOCK, "salt") != block_hashes(tokens, 128)
    output = tuple(range(ROUTING_BLOCK))
    grown = request_blocks(request(tokens, "salt", output), known=blocks)
    assert grown == block_hashes([*tokens, *output], ROUTING_BLOCK, "salt")
    assert len(blocks) == 2 and len(grown) == 3


def test_overlap_is_the_part_that_was_sent_before():
    index = PrefixIndex()
    assert index.overlap(chain(1, 2)) == index.overlap([]) == 0
    index.use(chain(1, 2, 3))
    assert index.overlap(chain(1, 2, 3, 4)) == capacity(3)
    assert index.overlap(chain(1, 2, 4)) == capacity(2)
    assert index.overlap(chain(2, 3)) == 0


def test_what_was_used_longest_ago_is_forgotten_tails_first():
    index = PrefixIndex(capacity(4))
    index.use(chain(1, 2, 3))
    index.use(chain(7))
    index.use(chain(8))
    assert index.overlap(chain(1, 2, 3)) == capacity(2)
    index.use(chain(1, 2))
    index.use(chain(9))
    assert [index.overlap(chain(n)) for n in (7, 8, 9)] == [0, capacity(1), capacity(1)]
    assert index.overlap(chain(1, 2)) == capacity(2)


def test_smaller_cache_forgets_at_once():
    index = PrefixIndex()
    index.use(chain(1, 2, 3))
    index.resize(capacity(2) + 5)
    assert len(index) == 2 and index.overlap(chain(1, 2, 3)) == capacity(2)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=30),
    st.integers(0, 8),
    st.lists(st.integers(0, 2), max_size=5),
)
def test_what_is_known_of_a_sequence_is_its_beginning(used, num_blocks, asked):
    index = PrefixIndex(capacity(num_blocks))
    for parts in used:
        index.use(chain(*parts))
    assert len(index) <= num_blocks
    known = [block in index._blocks for block in chain(*asked)]
    assert known == sorted(known, reverse=True)
    assert index.overlap(chain(*asked)) == capacity(sum(known))
