"""Requests of every shape that come, are aborted and preempted at random; nothing may be lost."""

import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from engine.core import EngineCore
from engine.request import EngineRequest
from tests.engine.conftest import TINY_LLAMA, request, run_core, tiny_config
from tests.engine.gpu import needs_gpu

VOCAB = TINY_LLAMA["vocab_size"]
EOS = TINY_LLAMA["eos_token_id"]
LONGEST = 360
CHECK_EVERY = 50
FORCED_EVERY = 11
ROUNDING = 0.03
"""How far log-probabilities of the tiny model in bfloat16 may part.

Of 100 wrong tokens, 99 are further from the likeliest one."""


def random_params(rng):
    """Half greedy and plain, the others with several options at once."""
    params = {"max_tokens": rng.randint(1, 60), "seed": rng.randrange(2**31)}
    if rng.random() < 0.5:
        return params | {"temperature": 0.0}
    options = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 2.0]),
        "top_k": rng.choice([0, 1, 5, 50]),
        "top_p": rng.choice([1.0, 0.9, 0.3]),
        "min_p": rng.choice([0.0, 0.05]),
        "presence_penalty": rng.choice([0.0, 0.5]),
        "frequency_penalty": rng.choice([0.0, -0.5, 1.0]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "logit_bias": rng.choice([None, {5: 5.0, 7: -100.0}]),
        "min_tokens": rng.randint(0, params["max_tokens"]),
        "stop_token_ids": rng.sample(range(VOCAB), rng.choice([0, 5, 30])),
        "ignore_eos": rng.random() < 0.5,
        "logprobs": rng.choice([None, 0, 3]),
        "prompt_logprobs": rng.choice([None, None, 2]),
    }
    return params | {name: options[name] for name in rng.sample(list(options), 4)}


def random_requests(count, seed):
    rng = random.Random(seed)
    shared = [[rng.randrange(VOCAB) for _ in range(200)] for _ in range(3)]
    wires = []
    for i in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 300))]
        if rng.random() < 0.3:
            prefix = rng.choice(shared)[: rng.randint(1, 200)]
            prompt = (prefix + prompt)[:300]
        wires.append(request(f"r{i}", prompt, **random_params(rng)))
    return wires


@dataclass
class Outcome:
    """What came of one request."""

    tokens: list[int] = field(default_factory=list)
    num_logprobs: int = 0
    scored_prompt: list[int] = field(default_factory=list)
    reason: str | None = None
    aborted: bool = False


class Soak:
    """Lets requests come over time and takes in what the engine says of them."""

    def __init__(self, core: EngineCore, wires: list[EngineRequest], seed: int) -> None:
        self.core, self.rng = core, random.Random(seed)
        self.to_come = wires[::-1]
        self.doomed = {w.request_id: self.rng.randint(0, 20) for w in wires[5::10]}
        """Request → tokens after which it is aborted."""
        self.outcomes = defaultdict(Outcome)
        self.live: set[str] = set()
        self.steps = 0

    def run(self) -> dict[str, Outcome]:
        while self.to_come or self.core.has_work:
            self.arrive()
            self.abort()
            if self.core.has_work:
                for delta in self.core.step():
                    self.take(delta)
            self.steps += 1
            if self.steps % CHECK_EVERY == 0:
                self.core.check_invariants()
            assert self.steps < 100_000
        self.core.check_invariants()
        return self.outcomes

    def arrive(self) -> None:
        """Bursts, and lulls in which the engine may run dry."""
        burst = self.rng.choices([0, 1, 8, 60], [70, 25, 4, 1])[0]
        for _ in range(min(burst, len(self.to_come))):
            wire = self.to_come.pop()
            self.live.add(wire.request_id)
            self.core.add(wire)

    def abort(self) -> None:
        due = [r for r in sorted(self.live & self.doomed.keys()) if self.is_due(r)]
        self.core.abort(due)
        for request_id in due:
            self.live.remove(request_id)
            self.outcomes[request_id].aborted = True

    def is_due(self, request_id: str) -> bool:
        wanted = self.doomed[request_id]
        return len(self.outcomes[request_id].tokens) >= wanted and self.rng.random() < 0.5

    def take(self, delta) -> None:
        assert delta.request_id in self.live, "a request that has ended has no more to say"
        outcome = self.outcomes[delta.request_id]
        outcome.tokens += delta.token_ids
        outcome.num_logprobs += len(delta.logprobs or ())
        outcome.scored_prompt += [e.token_ids[0] for e in delta.prompt_logprobs or ()]
        if delta.finish_reason is not None:
            outcome.reason = delta.finish_reason
            self.live.remove(delta.request_id)


def check(wire: EngineRequest, outcome: Outcome) -> None:
    """What holds of every request, whatever it drew."""
    params, tokens = wire.params, outcome.tokens
    assert all(0 <= token < VOCAB for token in tokens)
    assert len(tokens) <= params.max_tokens
    assert outcome.num_logprobs == (len(tokens) if params.logprobs is not None else 0)
    if outcome.aborted:
        assert outcome.reason is None
        return
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    assert stops.isdisjoint(tokens[:-1])
    stopped = tokens[-1] in stops
    assert outcome.reason == ("stop" if stopped else "length")
    assert stopped or len(tokens) == params.max_tokens
    assert len(tokens) >= params.min_tokens
    if params.prompt_logprobs is not None:
        assert outcome.scored_prompt == wire.prompt_token_ids[1:]


def soak(model, count, **options):
    defaults = {"num_kvcache_blocks": 64, "max_model_len": LONGEST, "kvcache_block_size": 16}
    options = {**defaults, **options}
    core = EngineCore(
        tiny_config(model, max_num_batched_tokens=256, force_preempt_every=FORCED_EVERY, **options)
    )
    wires = random_requests(count, seed=count)
    run = Soak(core, wires, seed=1)
    outcomes = run.run()
    assert outcomes.keys() == {wire.request_id for wire in wires}
    for wire in wires:
        check(wire, outcomes[wire.request_id])
    load = core.load()
    assert load.free_blocks == load.total_blocks == core.info.num_blocks - 1
    assert load.num_running == load.num_waiting == load.running_tokens == 0
    assert load.num_preemptions > load.step // FORCED_EVERY  # the pool ran dry as well
    assert load.prefix_hits > 0
    assert any(outcome.aborted and outcome.tokens for outcome in outcomes.values())
    alone = EngineCore(tiny_config(model, max_num_seqs=1, **options, enable_prefix_caching=False))
    exact = alone.info.dtype == "float32"
    plain = [w for w in wires if is_plain(w) and (exact or not is_edited(w))]
    plain = [w for w in plain if not outcomes[w.request_id].aborted][:20]
    for wire in plain:
        (check_same if exact else check_likely)(alone, wire, outcomes[wire.request_id])
    assert len(plain) == 20


def is_plain(wire):
    return wire.params.greedy and wire.params.max_tokens > 10


def is_edited(wire):
    params = wire.params
    penalised = params.presence_penalty or params.frequency_penalty
    return penalised or params.repetition_penalty != 1.0 or params.logit_bias or params.min_tokens


def check_same(alone, wire, outcome):
    """An engine that has the request to itself says the same."""
    assert run_core(alone, [wire])[wire.request_id] == (outcome.tokens, outcome.reason)


def check_likely(alone, wire, outcome):
    """It finds each token the likeliest after those before, or as likely but for rounding.

    In bfloat16 the size of a batch shows in the last bits, so that greedy tokens may part.
    """
    tokens = wire.prompt_token_ids + outcome.tokens[:-1]
    alone.add(request(wire.request_id, tokens, max_tokens=1, prompt_logprobs=1))
    entries = []
    while alone.has_work:
        entries += [e for delta in alone.step() for e in delta.prompt_logprobs or ()]
    scored = entries[len(wire.prompt_token_ids) - 1 :]
    assert len(scored) == len(outcome.tokens) - 1
    for entry in scored:
        assert entry.logprobs[0] >= entry.logprobs[1] - ROUNDING


@pytest.mark.parametrize("ahead", [False, True])
def test_soak(tiny_model, ahead):
    soak(tiny_model, 120, device="cpu", async_scheduling=ahead)


def test_soak_in_half_precision(tiny_model):
    soak(tiny_model, 120, device="cpu", dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ahead", [False, True])
def test_long_soak(tiny_model, ahead):
    soak(tiny_model, 2000, device="cpu", async_scheduling=ahead)


class TestOnGPU:
    pytestmark = needs_gpu

    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
    def test_soak(self, tiny_model, graphs, dtype):
        soak(tiny_model, 2000, device="cuda", dtype=dtype, enforce_eager=not graphs)
