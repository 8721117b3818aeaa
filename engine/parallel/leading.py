"""The first rank's part: it plans every step and has the others do the same."""

from __future__ import annotations

import socket
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, RankLost, TrunklineError
from engine.failures import drop_locals
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.parallel.following import READY
from engine.parallel.group import ALONE
from engine.parallel.meeting import Meeting
from engine.parallel.messages import encode_masks, encode_plan
from engine.parallel.processes import RankProcesses
from engine.parallel.share import share_of
from engine.runner.build import EngineInfo, build_runner, choose_device
from engine.runner.model_runner import ModelRunner, PendingStep
from engine.sampling.token_masks import TokenMasks
from engine.startup import Stopwatch
from engine.step import StepPlan, StepResult

ARRIVAL_LOOK_S = 0.5
"""How often the first rank looks whether those that have not arrived yet still live."""


REASON_LIMIT_S = 5.0
"""How long a rank that failed may take to say why."""


class LaunchedRanks(Protocol):
    """The ranks after the first, wherever they run."""

    def check(self) -> None:
        """See whether all still run; ConfigError if one does not."""

    def end(self) -> None:
        """End them."""


LaunchRanks = Callable[[Meeting], LaunchedRanks]
"""Has `follow(meeting, rank)` run in a process of this machine for each rank but the first."""


class Links:
    """To the other ranks. A thread for each waits for the rank's word, or its end."""

    def __init__(self, links: list[Connection]) -> None:
        self._links = links
        self._ready = threading.Semaphore(0)
        self._lost: str | None = None
        self._ended = threading.Event()
        self.group = ALONE
        """Left when a rank is lost, as this one may wait for it in an exchange."""
        for link in links:
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def wait_until_ready(self) -> None:
        """Wait until all have said so once more.

        Raises:
            RankLost: one has ended instead.
        """
        for _ in self._links:
            self._ready.acquire()
            self.check()

    def tell(self, message: bytes) -> None:
        """Send a message to all.

        Raises:
            RankLost: one has ended.
        """
        self.check()
        try:
            for link in self._links:
                link.send_bytes(message)
        except OSError as error:
            raise RankLost(f"a rank of the engine was lost: {error}") from error

    def check(self) -> None:
        """Raise RankLost if a rank has ended, or is out of step."""
        if self._lost is not None:
            raise RankLost(self._lost)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Do what all ranks do, or none may go on.

        Raises:
            RankLost: it failed here.
        """
        try:
            yield
        except BaseException as error:
            self._lose(f"the ranks are out of step after {error!r}")
            if isinstance(error, Exception):
                raise RankLost(self._lost) from error
            raise

    @contextmanager
    def telling_why(self) -> Iterator[None]:
        """Let a failure of the start be that of the rank that failed first."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, TrunklineError):  # of an exchange, it comes before its reason
                self._ended.wait(REASON_LIMIT_S)
            if self._lost is not None:
                raise ConfigError(f"the engine cannot start: {self._lost}") from error
            raise

    def _listen(self, link: Connection) -> None:
        told = "a rank of the engine was lost"
        try:
            while (word := link.recv_bytes()) == READY:
                self._ready.release()
            told = f"{told}: {word.decode()}"
        except (EOFError, OSError):
            pass
        self._lose(told)
        self._ready.release(len(self._links))
        self.group.leave(lost=True)

    def _lose(self, reason: str) -> None:
        self._lost = self._lost or reason
        self._ended.set()


class LeadingStep:
    """A step that all ranks do; see `engine.runner.model_runner.PendingStep`."""

    def __init__(self, pending: PendingStep, links: Links) -> None:
        self._pending = pending
        self._links = links

    @property
    def prepare_s(self) -> float:
        """On this rank."""
        return self._pending.prepare_s

    @property
    def launch_s(self) -> float:
        """On this rank."""
        return self._pending.launch_s

    @property
    def timers(self) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        """Of this rank's device."""
        return self._pending.timers

    def sample(self, masks: TokenMasks | None) -> None:
        """Launch the sampling on all ranks.

        Raises:
            RankLost: a rank has ended, or this one failed.
        """
        message = encode_masks(masks)
        with self._links.in_step():
            self._links.tell(message)
            self._pending.sample(masks)

    def result(self) -> StepResult:
        """What this rank has sampled.

        Raises:
            RankLost: a rank has ended. What came of an exchange that was broken off means nothing,
                and on a GPU is no error.
        """
        result = self._pending.result()
        self._links.check()
        return result


class LeadingRunner:
    """A runner each of whose steps the other ranks do as well, in the same order.

    A step that fails here has or has not run there: the ranks are then out of step for good, which
    is the engine's end.
    """

    def __init__(self, runner: ModelRunner, links: Links) -> None:
        self._runner = runner
        self._links = links

    @property
    def profiling(self) -> bool:
        """See `ModelRunner`."""
        return self._runner.profiling

    @profiling.setter
    def profiling(self, on: bool) -> None:
        """This rank's; the others keep no times."""
        self._runner.profiling = on

    def execute(self, plan: StepPlan) -> LeadingStep:
        """Launch a step on all ranks.

        Raises:
            RankLost: a rank has ended, or this one failed.
        """
        message = encode_plan(plan)
        with self._links.in_step():
            self._links.tell(message)
            return LeadingStep(self._runner.execute(plan), self._links)


def build_ranks(
    config: EngineConfig, stopwatch: Stopwatch, launch: LaunchRanks | None = None
) -> tuple[ModelRunner | LeadingRunner, EngineInfo]:
    """Build the runner of an engine; if several ranks share it, with the others beside it.

    Args:
        config: of the engine.
        stopwatch: gets the times of the start's stages, those of this rank.
        launch: starts the others; None starts processes.

    Raises:
        ConfigError: an option does not fit the model or the machine, here or on another rank.
    """
    if config.tensor_parallel_size == 1:
        return build_runner(config, stopwatch)
    share_of(read_model_config(resolve_model(config.model)), config.tensor_parallel_size)
    device = choose_device(config)
    with ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="tl-ranks-"))
        meeting = Meeting.call(Path(folder), config.model_copy(update={"device": device.type}))
        with meeting.listen() as listener:
            ranks = (launch or RankProcesses)(meeting)
            undo.callback(ranks.end)
            links = Links(_arrivals(listener, ranks, config.tensor_parallel_size - 1))
        stopwatch.lap("ranks")
        with links.telling_why():
            links.wait_until_ready()
            group = links.group = meeting.join(0, device)
            undo.callback(group.leave)
            undo.push(_drop_graphs_of_failure)
            runner, info = build_runner(config, stopwatch, group)
            undo.callback(runner.release_graphs)
            links.wait_until_ready()
        leading = LeadingRunner(runner, links)
        weakref.finalize(leading, undo.pop_all().close)
    return leading, info


def _drop_graphs_of_failure(
    kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Let go of what a failure refers to: the group cannot be left while graphs are there."""
    drop_locals(error)


def _arrivals(listener: socket.socket, ranks: LaunchedRanks, count: int) -> list[Connection]:
    """Links to the other ranks, once they have come.

    Raises:
        ConfigError: one has ended before it came.
    """
    links: list[Connection] = []
    listener.settimeout(ARRIVAL_LOOK_S)
    while len(links) < count:
        try:
            link, _ = listener.accept()
        except TimeoutError:
            ranks.check()
            continue
        link.setblocking(True)
        links.append(Connection(link.detach()))
    return links
