"""What comes to a real scheduler, as the load meter counts it; the time of a step is the test's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import pytest

from deployments.load_meter import EngineUse, LoadMeter
from engine.config import EngineConfig
from engine.loop import EngineLoop
from engine.outputs import EngineLoad, TokenDelta
from engine.request import EngineRequest, Request
from engine.sampling_params import SamplingParams
from engine.scheduler.scheduler import Scheduler
from engine.snapshot import EngineSnapshot
from engine.step import StepResult

STEP_S = 0.1
MAX_MODEL_LEN = 8192
MAX_NUM_SEQS = 32


class SchedulerCore:
    """A core of a scheduler alone: every token is 1."""

    def __init__(self, num_blocks: int) -> None:
        self.scheduler = Scheduler(
            EngineConfig(max_num_seqs=MAX_NUM_SEQS, enable_prefix_caching=False),
            num_blocks=num_blocks,
            block_size=16,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=2048,
            eos_token_ids=(),
        )
        self.abort = self.scheduler.abort
        self.load = self.scheduler.load
        self.fail_all = self.scheduler.fail_all
        self.check_invariants = self.scheduler.check_invariants

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, wire: EngineRequest) -> None:
        self.scheduler.add(Request.from_wire(wire, MAX_MODEL_LEN))

    def step(self) -> list[TokenDelta]:
        plan = self.scheduler.schedule()
        if not plan.rows:
            return []
        return self.scheduler.update(plan, StepResult([1] * sum(plan.samples)))

    def snapshot(self) -> EngineSnapshot:
        return self.scheduler.snapshot()


def request(request_id: str, num_tokens: int, max_tokens: int) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
    return EngineRequest(request_id, [1] * num_tokens, params)


class Run:
    """A loop around a scheduler. Between steps `turn` is called with their number."""

    def __init__(
        self, num_blocks: int, turn: Callable[[Run, int], None], first: Iterable[EngineRequest]
    ) -> None:
        self.meter, self.load = LoadMeter(MAX_NUM_SEQS), EngineLoad()
        self.over = threading.Event()
        self._turn, self._num_steps = turn, 0
        self._begun = False  # a slow machine may have the loop tell that it is idle before
        core = SchedulerCore(num_blocks)
        self.meter.follow(core.load(), 0.0)
        self.loop = EngineLoop(core, self._on_step, lambda _: self.over.set())
        self.loop.submit(list(first))
        self._begun = True
        assert self.over.wait(60)
        assert self.loop.alive
        self.loop.stop()

    def use(self) -> EngineUse:
        return self.meter.read(self._num_steps * STEP_S)

    def _on_step(self, _: list[TokenDelta], load: EngineLoad) -> None:
        if self._begun and load.new_requests and not self.over.is_set():
            self._num_steps += 1
            self.load = load
            self.meter.follow(load, self._num_steps * STEP_S)
            self._turn(self, self._num_steps)


@pytest.mark.parametrize("patience", [None, 10], ids=["patient", "impatient"])
def test_clients_that_give_up_do_not_hide_those_that_come(patience):
    def turn(run: Run, number: int) -> None:
        run.loop.submit([request(f"r{number}", 1000, 10)])
        if patience is not None:
            run.loop.abort([f"r{number - patience}"])
        if number == 200:
            run.over.set()

    # Long answers take all rows, so that those who come wait.
    long = [request(f"long{number}", 10, 7000) for number in range(MAX_NUM_SEQS)]
    run = Run(MAX_NUM_SEQS * MAX_MODEL_LEN // 16, turn, long)
    use = run.use()
    assert (use.arriving_requests_s, use.arriving_tokens_s) == pytest.approx((10, 10_000), rel=0.05)


def test_what_is_preempted_does_not_come_again():
    rates = []

    def turn(run: Run, number: int) -> None:
        rates.append(run.use().arriving_tokens_s)
        if run.load.num_running + run.load.num_waiting == 0:
            run.over.set()

    prompts = [request(f"r{number}", 256, 512) for number in range(MAX_NUM_SEQS)]
    run = Run(600, turn, prompts)  # half of what all need at their ends
    assert run.load.num_preemptions > 5
    assert max(rates[200:]) < 10  # 20 s after they have come
