"""The first rank's part: it plans every step and has the others do the same."""

from __future__ import annotations

import socket
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from engine.config import EngineConfig
from engine.errors import ConfigError, RankLost, TrunklineError
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.parallel.following import READY
from engine.parallel.meeting import Meeting, leave
from engine.parallel.messages import encode_masks, encode_plan
from engine.parallel.partition import share_of
from engine.parallel.processes import RankProcesses
from engine.runner.build import EngineInfo, build_runner, choose_device
from engine.runner.model_runner import ModelRunner, PendingStep
from engine.sampling.token_masks import TokenMasks
from engine.startup import Stopwatch
from engine.step import StepPlan

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
        for link in links:
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def wait_until_ready(self) -> None:
        """Wait until all have loaded.

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
        """Raise RankLost if a rank has ended."""
        if self._lost is not None:
            raise RankLost(self._lost)

    @contextmanager
    def telling_why(self) -> Iterator[None]:
        """Let a failure of the start be that of the rank that failed first."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, TrunklineError):  # of an exchange, it comes before its reason
                self._ready.acquire(timeout=REASON_LIMIT_S)
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
        self._lost = self._lost or told
        leave()  # this rank may wait for the lost one in an exchange
        self._ready.release()


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

    def execute(self, plan: StepPlan) -> PendingStep:
        """Launch a step on all ranks.

        Raises:
            RankLost: a rank has ended, or this one failed.
        """
        self._links.tell(encode_plan(plan))
        try:
            pending = self._runner.execute(plan)
        except Exception as error:
            self._links.check()
            raise RankLost(f"the ranks are out of step after {error!r}") from error
        if pending.waiting_sample is not None:
            pending.waiting_sample = partial(self._sample, pending.waiting_sample)
        return pending

    def _sample(
        self,
        sample: Callable[[PendingStep, TokenMasks | None], None],
        pending: PendingStep,
        masks: TokenMasks | None,
    ) -> None:
        self._links.tell(encode_masks(masks))
        sample(pending, masks)


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
    folder = tempfile.TemporaryDirectory(prefix="tl-ranks-")
    meeting = Meeting.call(Path(folder.name), config)
    with meeting.listen() as listener, ExitStack() as undo:
        ranks = (launch or RankProcesses)(meeting)
        undo.callback(_end, folder, ranks)
        links = Links(_arrivals(listener, ranks, config.tensor_parallel_size - 1))
        stopwatch.lap("ranks")
        with links.telling_why():
            group = meeting.join(0, choose_device(config))
            runner, info = build_runner(config, stopwatch, group)
            links.wait_until_ready()
        leading = LeadingRunner(runner, links)
        weakref.finalize(leading, undo.pop_all().close)
    return leading, info


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


def _end(folder: tempfile.TemporaryDirectory[str], ranks: LaunchedRanks) -> None:
    leave()
    ranks.end()
    folder.cleanup()
