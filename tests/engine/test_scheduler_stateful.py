"""The scheduler under random use, checked against the harness's brute-force truth."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.kv_cache import block_allocator
from engine.kv_cache.block_allocator import BlockAllocator
from engine.kv_cache.block_pool import BlockPool
from engine.scheduler.step_builder import StepBuilder
from engine.step_times import UNKNOWN_TIMES, StepTimes
from tests.engine.scheduler_harness import EOS, VOCAB, Driver, sampled_token

MAX_LEN = 24
BASES = [[(7 * i + k) % VOCAB for i in range(MAX_LEN)] for k in (0, 0, 1)]

UNEVEN = StepTimes({6: 1.0}, {3: 1.0, 8: 1.1, 24: 9.0, 40: 9.1}, token_s=0.5, max_rows=5)
"""Times by which many a step ends early."""


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, aborts, schedules and updates in any order, at most two steps in flight."""

    @initialize(
        policy=st.sampled_from(["fcfs", "priority", "sjf"]),
        block_size=st.sampled_from([1, 2, 4]),
        spare_blocks=st.integers(0, 12),
        budget=st.sampled_from([1, 2, 5, 16, 64]),
        max_num_seqs=st.integers(1, 6),
        two_phase=st.booleans(),
        caching=st.sampled_from([True, True, False]),
        force=st.sampled_from([0, 0, 1, 2, 5]),
        times=st.sampled_from([UNKNOWN_TIMES, UNEVEN]),
    )
    def start(
        self,
        policy,
        block_size,
        spare_blocks,
        budget,
        max_num_seqs,
        two_phase,
        caching,
        force,
        times,
    ):
        self.count = 0
        self.driver = Driver(
            num_blocks=MAX_LEN // block_size + 1 + spare_blocks,
            block_size=block_size,
            max_model_len=MAX_LEN,
            budget=budget,
            max_num_seqs=max_num_seqs,
            scheduling_policy=policy,
            sjf_max_wait_s=3.0,
            two_phase=two_phase,
            enable_prefix_caching=caching,
            force_preempt_every=force,
            times=times,
        )

    @rule(
        base=st.sampled_from(BASES),
        length=st.integers(1, MAX_LEN - 1),
        resumed=st.sampled_from([0, 0, 0, 3]),
        seed=st.integers(0, 1),
        max_tokens=st.integers(1, MAX_LEN),
        min_tokens=st.sampled_from([0, 0, 3]),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (), (3,), (EOS, 5)]),
        logprobs=st.sampled_from([None, 0]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, None, "a"]),
        pooling=st.sampled_from([None, None, None, "last", "mean"]),
    )
    def add(self, base, length, resumed, seed, max_tokens, min_tokens, salt, pooling, **options):
        if pooling is not None:
            resumed = 0
        resumed = min(resumed, max_tokens - 1, MAX_LEN - 1 - length)
        outputs = [sampled_token(seed, length + i) for i in range(resumed)]
        self.count += 1
        self.driver.add(
            f"r{self.count}",
            base[:length],
            outputs,
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            cache_salt=salt,
            pooling=pooling,
            **options,
        )

    @precondition(lambda self: self.driver.live)
    @rule(data=st.data())
    def abort(self, data):
        self.driver.abort(data.draw(st.sampled_from(sorted(self.driver.live))), "unknown")

    @precondition(lambda self: len(self.driver.in_flight) < 2)
    @rule()
    def schedule(self):
        self.driver.schedule()

    @precondition(lambda self: self.driver.in_flight)
    @rule()
    def update(self):
        self.driver.update()

    @rule(steps=st.integers(1, 6))
    def advance(self, steps):
        for _ in range(steps):
            self.driver.step()
            self.driver.scheduler.check_invariants()

    @rule(seconds=st.sampled_from([0.5, 4.0]))
    def wait(self, seconds):
        self.driver.now += seconds

    @precondition(lambda self: self.count % 7 == 3)
    @rule()
    def fail(self):
        self.driver.fail_all()

    @precondition(lambda self: self.count % 5 == 2)
    @rule()
    def fail_in_flight(self):
        self.driver.fail_in_flight()

    @precondition(lambda self: self.count % 4 == 2)
    @rule()
    def retry_in_flight(self):
        self.driver.retry_in_flight()

    @invariant()
    def bookkeeping_agrees(self):
        if hasattr(self, "driver"):
            self.driver.scheduler.check_invariants()

    def teardown(self):
        if hasattr(self, "driver"):
            while self.driver.in_flight:
                self.driver.update()
            self.driver.run(ahead=self.count % 2 == 0)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def simulate(seed: int, *, check: bool = True, **options) -> Driver:
    """Twenty random requests through a tiny pool, one step ahead."""
    rng = random.Random(seed)
    defaults = {"num_blocks": 16, "block_size": 2, "max_model_len": MAX_LEN, "budget": 12}
    driver = Driver(check=check, **{**defaults, **options})
    for i in range(20):
        prompt = rng.choice(BASES)[: rng.randint(1, 14)]
        salt = rng.choice([None, "a"])
        tokens = rng.randint(1, 10)
        driver.add(f"r{i}", prompt, max_tokens=tokens, seed=rng.randint(0, 1), cache_salt=salt)
        if rng.random() < 0.5:
            driver.step()
    driver.run(ahead=True)
    return driver


WAYS = {
    "fcfs": {},
    "priority": {"scheduling_policy": "priority"},
    "sjf": {"scheduling_policy": "sjf"},
    "two phases": {"two_phase": True},
    "chunks of 3": {"budget": 3},
    "no cache": {"enable_prefix_caching": False},
    "one sequence": {"max_num_seqs": 1},
    "preempted at every step": {"force_preempt_every": 1, "num_blocks": 64},
    "preempted at every step in chunks": {"force_preempt_every": 1, "budget": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_ends_with_the_same_tokens(way):
    for seed in range(5):
        driver = simulate(seed, **WAYS[way])
        assert driver.scheduler.load().step > 20


def test_tiny_pools_do_preempt_and_do_hit():
    loads = [simulate(seed).scheduler.load() for seed in range(5)]
    assert sum(load.num_preemptions for load in loads) > 5
    assert sum(load.prefix_hits for load in loads) > 50


def test_forced_preemption_preempts_where_nothing_else_would():
    calm = simulate(0, num_blocks=512)
    forced = simulate(0, num_blocks=512, force_preempt_every=2)
    assert calm.scheduler.load().num_preemptions == 0
    assert forced.scheduler.load().num_preemptions > 10


def _evict_but_keep_the_name(pool):
    return pool._cached.popitem(last=False)[0]


def _free_twice_as_much(pool, blocks):
    for block in blocks:
        pool._ref_counts[block] = 0
        pool._empty.append(block)


def _hash_without_salt(hashes, token_ids, block_size, salt=None):
    REAL_EXTEND(hashes, token_ids, block_size)


def _hash_without_parent(hashes, token_ids, block_size, salt=None):
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        hashes.append(bytes(token_ids[start : start + block_size]))


def _register_too_early(allocator, request):
    request.num_computed_tokens += allocator.block_size
    REAL_REGISTER(allocator, request)
    request.num_computed_tokens -= allocator.block_size


def _omit_inputs(builder, request, count):
    REAL_ADD(builder, request, count)
    if count == 1:
        builder.plan.input_ids.pop(request.row, None)


REAL_EXTEND = block_allocator.extend_block_hashes
REAL_REGISTER = BlockAllocator.register
REAL_ADD = StepBuilder.add
BREAKAGES = {
    "an evicted block stays in the hash map": (
        BlockPool,
        "_evict_oldest",
        _evict_but_keep_the_name,
    ),
    "a shared block is freed for all": (BlockPool, "free", _free_twice_as_much),
    "hashes ignore the salt": (block_allocator, "extend_block_hashes", _hash_without_salt),
    "hashes do not chain": (block_allocator, "extend_block_hashes", _hash_without_parent),
    "a block is named before it is full": (BlockAllocator, "register", _register_too_early),
    "a known token is left to the device": (StepBuilder, "add", _omit_inputs),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_oracle_notices(breakage, monkeypatch):
    """Inverse check: a broken part must fail the simulation, invariants aside."""
    monkeypatch.setattr(*BREAKAGES[breakage])
    with pytest.raises((AssertionError, IndexError, KeyError, TypeError)):
        for seed in range(10):
            simulate(seed, check=False, budget=12 if seed % 2 else 3)
