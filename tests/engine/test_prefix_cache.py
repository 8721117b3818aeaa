"""Which blocks a request starts from, and what the counters say of it."""

import subprocess
import sys

import pytest

from engine.kv_cache.hashing import DIGEST_SIZE, block_hashes, extend_block_hashes
from tests.engine.scheduler_harness import Driver

PROMPT = list(range(1, 11))


def cached(driver: Driver, request_id: str, prompt: list[int], **options) -> int:
    """Run one request alone; tokens that its first delta reports as cached."""
    before = driver.scheduler.load().prefix_hits
    driver.add(request_id, prompt, **options)
    told = 0
    while driver.scheduler.has_work:
        for delta in driver.step():
            told += delta.num_cached_tokens
    assert driver.scheduler.load().prefix_hits - before == told
    return told


def test_hashes_depend_on_every_token_before():
    one, other = block_hashes([1, 2, 3, 4, 5], 2), block_hashes([9, 2, 3, 4], 2)
    assert len(one) == len(other) == 2
    assert len({*one, *other}) == 4
    assert all(len(name) == DIGEST_SIZE for name in one)
    assert block_hashes([1, 2, 9, 9], 2)[0] == one[0]


def test_hashes_depend_on_the_salt():
    families = [block_hashes(PROMPT, 2, salt) for salt in (None, "", "a", "b")]
    assert len({name for family in families for name in family}) == 20


@pytest.mark.parametrize("known", range(0, 11, 3))
def test_hashes_extend_as_tokens_come(known):
    hashes = block_hashes(PROMPT[:known], 3, "s")
    extend_block_hashes(hashes, PROMPT, 3, "s")
    assert hashes == block_hashes(PROMPT, 3, "s")


def test_hashes_are_the_same_in_every_process():
    """Routers compare them with those of engines elsewhere."""
    assert block_hashes([1, 2, 3], 2)[0].hex() == "9b39f61446f7f52a663c2618142dda11"


def test_hashing_needs_no_torch():
    code = "import sys, engine.kv_cache.hashing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_prefix_is_found_again():
    driver = Driver()
    assert cached(driver, "first", PROMPT) == 0
    assert cached(driver, "longer", [*PROMPT, 11, 11]) == 8
    assert cached(driver, "forked", [*PROMPT[:5], 11, 11, 11]) == 4
    assert cached(driver, "other", [11, *PROMPT]) == 0
    load = driver.scheduler.load()
    assert (load.prefix_queries, load.prefix_hits) == (10 + 12 + 8 + 11, 12)


def test_a_whole_prompt_in_the_cache_leaves_one_token_to_compute():
    driver = Driver()
    cached(driver, "first", PROMPT[:9])
    assert cached(driver, "same", PROMPT[:9]) == 8
    assert (driver.plans[-4].starts, driver.plans[-4].num_tokens) == ([8], [1])
    assert cached(driver, "a full block less", PROMPT[:8]) == 4


def test_output_tokens_are_found_too():
    driver = Driver()
    truth = driver.add("first", PROMPT[:4], max_tokens=9)
    driver.run()
    assert cached(driver, "next turn", [*PROMPT[:4], *truth.got, 5]) == 12


def test_requests_of_one_step_share():
    driver = Driver()
    for i in range(3):
        driver.add(f"r{i}", PROMPT, seed=i)
    plan = driver.schedule()
    assert dict(zip(plan.rows, plan.num_tokens, strict=True)) == {0: 10, 1: 2, 2: 2}
    driver.update()
    driver.run()


def test_salts_do_not_share():
    driver = Driver()
    cached(driver, "a", PROMPT, cache_salt="a")
    assert cached(driver, "b", PROMPT, cache_salt="b") == 0
    assert cached(driver, "none", PROMPT) == 0
    assert cached(driver, "a again", PROMPT, cache_salt="a") == 8


def test_prompt_logprobs_are_computed_in_full():
    driver = Driver()
    cached(driver, "first", PROMPT)
    assert cached(driver, "scored", PROMPT, prompt_logprobs=0) == 0
    assert driver.scheduler.load().prefix_queries == 10
    assert cached(driver, "third", PROMPT) == 8


def test_nothing_is_found_when_switched_off():
    driver = Driver(enable_prefix_caching=False)
    cached(driver, "first", PROMPT)
    assert cached(driver, "second", PROMPT) == 0
    assert driver.scheduler.load().prefix_queries == 0


def test_a_resumed_request_counts_prompt_tokens_only():
    driver = Driver()
    truth = driver.add("lost", PROMPT[:6], max_tokens=12)
    driver.run()
    outputs = truth.got[:9]
    assert cached(driver, "resumed", PROMPT[:6], outputs=outputs, max_tokens=12) == 6
    assert driver.plans[-1].starts[0] > 12
