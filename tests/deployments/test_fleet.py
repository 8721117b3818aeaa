"""Routing in simulated time: chats and bursts over four engines; see `fleet`."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from deployments.placement import Policy, PowerOfTwo, PrefixLoad, RoundRobin
from tests.deployments.fleet import Chat, Fleet, scripted_chats

OURS = PrefixLoad()

CHATS = {"number": 32, "num_turns": 8, "said": (60, 200), "answered": (20, 60)}
"""43,000 tokens in the end: two and a half times the cache of an engine."""
WORKLOADS = {
    "chats": ({"pause_s": 1.0, "every_s": 0.05}, {}),
    "busy": ({"pause_s": 0.1, "every_s": 0.0}, {}),
    "slow": ({"pause_s": 5.0, "every_s": 1.0}, {}),
    "system prompt": (
        {"number": 64, "num_turns": 4, "system": 1024, "pause_s": 1.0, "every_s": 0.05},
        {"cache_tokens": 40_000},
    ),
}


@pytest.fixture(autouse=True)
def same_luck():
    """Idle engines that nothing sets apart are tried in a random order."""
    random.seed(0)


def run(policy: Policy, workload: str = "chats", seed: int = 0, num_ingresses: int = 1) -> Fleet:
    script, sizes = WORKLOADS[workload]
    fleet = Fleet(policy, num_ingresses=num_ingresses, seed=seed, **sizes)
    fleet.run(scripted_chats(**{**CHATS, **script}, seed=seed))
    return fleet


def excess(figures: list[int]) -> float:
    """The largest as a multiple of the mean."""
    return max(figures) * len(figures) / sum(figures)


@pytest.mark.parametrize("num_ingresses", [1, 2, 3])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_chats_find_their_cache_and_no_engine_gets_too_much(workload, num_ingresses):
    for seed in range(3):
        fleet = run(OURS, workload, seed, num_ingresses)
        assert fleet.hits >= 0.9 * fleet.infinite_hits
        assert excess(list(fleet.sent.values())) <= 1.3
        assert excess([engine.prefilled for engine in fleet.engines.values()]) <= 1.3


def test_policies_that_do_not_look_at_the_prompt_miss_half():
    aware = run(OURS)
    for policy in (RoundRobin(), PowerOfTwo()):
        blind = run(policy)
        assert blind.hits < 0.6 * blind.infinite_hits
        assert sum(aware.ttfts) < sum(blind.ttfts)


def burst(prompts: list[list[int]], *before: list[int], num_ingresses: int = 1) -> list[int]:
    """Requests by engine of a burst, sent when what came before has ended."""
    fleet = Fleet(OURS, num_ingresses=num_ingresses, cache_tokens=131_072)
    fleet.run([Chat(f"w{i}", i, [(prompt, [1] * 20, 0.0)]) for i, prompt in enumerate(before)])
    sent = Counter(fleet.sent)
    fleet.run([Chat(f"b{i}", 1.0, [(prompt, [1] * 50, 0.0)]) for i, prompt in enumerate(prompts)])
    return sorted((Counter(fleet.sent) - sent).values())


def prompts_of(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(sum(lengths))
    return [[rng.randrange(50_000) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("seed", range(10))
def test_burst_of_unequal_prompts_is_spread_evenly(seed):
    rng = random.Random(seed)
    prompts = prompts_of([rng.randint(160, 480) for _ in range(16)])
    assert burst(prompts) == [4, 4, 4, 4]
    earlier = prompts_of([rng.randint(160, 480) for _ in range(3)])
    assert burst(prompts, *earlier) == [4, 4, 4, 4]


@pytest.mark.parametrize("length", [5, 300, 3000])
def test_burst_of_one_prompt_is_spread_evenly(length):
    assert burst(prompts_of([length]) * 16) == [4, 4, 4, 4]


def test_burst_of_a_prompt_that_one_engine_has_does_not_all_go_there():
    (prompt,) = prompts_of([1000])
    assert max(burst([prompt] * 64, prompt)) <= 24


def test_hot_prefix_is_soon_in_every_cache():
    fleet = Fleet(OURS, cache_tokens=40_000)
    fleet.run(scripted_chats(400, 1, (60, 200), (20, 60), 1.0, every_s=0.01, system=1024))
    assert excess(list(fleet.sent.values())) <= 1.1
    assert fleet.hits >= 0.98 * fleet.infinite_hits
