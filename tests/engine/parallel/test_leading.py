"""The first rank's part, with another rank that only listens."""

from __future__ import annotations

import weakref
from multiprocessing import Pipe
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from engine.config import EngineConfig
from engine.errors import ConfigError, RankLost
from engine.failures import Failure, classify
from engine.layers.linear import SummedLinear
from engine.parallel import following
from engine.parallel.following import READY
from engine.parallel.group import TensorGroup
from engine.parallel.leading import LeadingRunner, Links, build_ranks
from engine.parallel.meeting import Meeting
from engine.startup import Stopwatch
from engine.step import StepPlan, StepResult

CPU = torch.device("cpu")


class Runner:
    """Computes nothing; its steps end with `failure`, if there is one, or are lost meanwhile."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.meanwhile = lambda: None
        self.prepare_s = self.launch_s = 0.0
        self.timers = None

    def execute(self, plan: StepPlan) -> Runner:
        if plan.step == 0:
            self.sample(None)
        return self

    def sample(self, masks) -> None:
        if self.failure is not None:
            raise self.failure

    def result(self) -> StepResult:
        self.meanwhile()
        return StepResult([7])


@pytest.fixture
def pair():
    """The first rank's runner, what it runs, and the other rank's end of the link."""
    near, far = Pipe()
    inner = Runner()
    yield LeadingRunner(inner, Links([near])), inner, far
    far.close()


@pytest.mark.parametrize("step", [0, 1])  # it fails as it is launched, or as it is sampled
def test_want_of_memory_on_one_rank_ends_the_engine(pair, step):
    leading, inner, _ = pair
    inner.failure = MemoryError()
    with pytest.raises(RankLost, match="out of step") as caught:
        leading.execute(StepPlan(step)).sample(None)
    assert classify(caught.value) is Failure.DEVICE_LOST


def test_ranks_that_were_interrupted_do_no_more_steps(pair):
    leading, inner, _ = pair
    inner.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        leading.execute(StepPlan(0))
    inner.failure = None
    with pytest.raises(RankLost, match="KeyboardInterrupt"):
        leading.execute(StepPlan(0))


def test_nothing_is_made_of_a_step_in_which_a_rank_was_lost(pair):
    leading, inner, far = pair
    assert leading.execute(StepPlan(0)).result().token_ids == [7]

    def lose() -> None:
        far.send_bytes(b"no more memory")
        assert leading._links._ended.wait(60)

    inner.meanwhile = lose
    with pytest.raises(RankLost, match="no more memory"):
        leading.execute(StepPlan(0)).result()


def test_a_group_that_was_left_leaves_the_next_one_alone(tmp_path):
    def join(name: str) -> TensorGroup:
        folder = tmp_path / name
        folder.mkdir()
        return Meeting.call(folder, EngineConfig()).join(0, CPU)

    first = join("first")
    first.leave()
    second = join("second")
    try:
        first.leave()
        assert distributed.is_initialized()
    finally:
        second.leave()
    assert not distributed.is_initialized()


def test_whoever_is_left_alone_clears_up(tmp_path, monkeypatch):
    folder = tmp_path / "meeting"
    folder.mkdir()
    meeting, statuses = Meeting.call(folder, EngineConfig()), []
    monkeypatch.setattr("engine.parallel.following.os._exit", statuses.append)
    near, far = Pipe()
    far.close()
    following._read(near, SimpleQueue(), meeting)
    assert statuses == [following.LEFT_ALONE]
    assert not folder.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_products_are_warmed_up_without_the_other_ranks(rank):
    class Strict(TensorGroup):
        def sum(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("threads would have the exchanges of two ranks in two orders")

    linear = SummedLinear(Strict(rank, 2), 8, 8, bias=False, dtype=torch.float32, device=CPU)
    linear._skinny_rows, residuals = 16, []
    linear._skinny = lambda x, weight, bias, *residual: residuals.append(residual) or x
    for call in linear.warm_ups(adds=True):
        call()
    assert [len(each) for each in residuals] == [1 - rank]  # the first rank adds


class Launched:
    """Ranks that say they are ready, to meet and to do steps, and do nothing else."""

    def __init__(self, meeting: Meeting) -> None:
        self.links = [meeting.connect() for _ in range(meeting.config.tensor_parallel_size - 1)]
        for link in [*self.links, *self.links]:
            link.send_bytes(READY)

    def check(self) -> None:
        pass

    def end(self) -> None:
        for link in self.links:
            link.close()


@pytest.fixture
def at_leave(monkeypatch):
    """What `found` says, whenever a group is left; NCCL waits until there are no graphs."""

    class Group(TensorGroup):
        def leave(self, *, lost=False) -> None:
            told.append(found[0]())

    found, told = [lambda: None], []
    monkeypatch.setattr(Meeting, "join", lambda self, rank, device: Group())
    return found, told


def build(monkeypatch, build_runner) -> LeadingRunner:
    monkeypatch.setattr("engine.parallel.leading.build_runner", build_runner)
    config = EngineConfig(device="cpu", tensor_parallel_size=3)
    leading, _ = build_ranks(config, Stopwatch(), Launched)
    assert isinstance(leading, LeadingRunner)
    return leading


def test_graphs_are_released_before_the_group_is_left(monkeypatch, at_leave):
    found, told = at_leave
    released = []
    runner = SimpleNamespace(release_graphs=lambda: released.append(True))
    leading = build(monkeypatch, lambda *args: (runner, None))
    found[0] = lambda: bool(released)
    assert told == []
    del leading
    assert told[0] is True


def test_graphs_of_a_start_that_failed_are_gone_before_the_group_is_left(monkeypatch, at_leave):
    found, told = at_leave
    graphs = []

    def fail(*args):
        graph = TensorGroup()
        graphs.append(weakref.ref(graph))
        raise ConfigError("there is no memory for it.")

    found[0] = lambda: graphs[0]() is None
    with pytest.raises(ConfigError, match="no memory"):
        build(monkeypatch, fail)
    assert told[0] is True
