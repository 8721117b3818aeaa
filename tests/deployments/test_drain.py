"""How `deployments.drain` waits for requests to end, and what signals do to that."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from deployments import drain
from deployments.names import INGRESS

STREAMING = [1, 2]
LIMIT_S = 20.0


class FakeServe:
    """Ray Serve: what it says at each look, the last of it for ever.

    A look is the states of the ingress replicas and their answers, or an exception in either place.
    """

    def __init__(self, *looks: Any) -> None:
        self.looks = list(looks)
        self.num_looks = 0
        self._answers: Any = None

    def status(self) -> Any:
        look = self.looks[min(self.num_looks, len(self.looks) - 1)]
        self.num_looks += 1
        if isinstance(look, Exception):
            raise look
        states, self._answers = look
        ingress = SimpleNamespace(replica_states=states)
        return SimpleNamespace(
            applications={"app": SimpleNamespace(deployments={INGRESS: ingress})}
        )

    def handle(self, deployment: str, name: str) -> Any:
        assert (deployment, name) == (INGRESS, "app")
        return SimpleNamespace(broadcast=lambda method: self)

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0 and return_exceptions
        if isinstance(self._answers, Exception):
            raise self._answers
        return list(self._answers)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(drain, "POLL_S", 0.001)
    monkeypatch.setattr(drain, "LAST_BYTES_S", 0.0)
    monkeypatch.setattr(drain.ray, "is_initialized", lambda: True)


RUNNING = {"RUNNING": 2}


@pytest.mark.parametrize(
    "busy",
    [
        (RUNNING, STREAMING),
        (RUNNING, [0, 1]),
        (RUNNING, TimeoutError("one lags")),
        (RUNNING, RayServeException("one is being replaced")),
        (RUNNING, [0, RuntimeError("it died")]),
        (RUNNING, [0]),
        ({"RUNNING": 1, "STOPPING": 1}, [0]),
        ({"RECOVERING": 2}, RayServeException("none runs")),
        ({"STOPPING": 2}, RayServeException("none runs")),
        ({"UPDATING": 1, "STARTING": 1}, RayServeException("none runs")),
        RuntimeError("no controller"),
    ],
)
@pytest.mark.parametrize("then", [(RUNNING, [0, 0]), ({"STARTING": 2}, []), ({}, [])])
def test_waits_until_all_have_said_that_nothing_is_under_way(fast, monkeypatch, busy, then):
    fake = FakeServe(busy, busy, then)
    monkeypatch.setattr(drain, "serve", fake)
    monkeypatch.setattr(drain, "DeploymentHandle", fake.handle)
    asyncio.run(asyncio.wait_for(drain._drain(), LIMIT_S))
    assert fake.num_looks == 3


def test_waits_no_longer_than_the_limit(fast, monkeypatch, capsys):
    release = threading.Event()

    def status() -> Any:
        release.wait(LIMIT_S)
        return SimpleNamespace(applications={})

    monkeypatch.setattr(drain, "serve", SimpleNamespace(status=status))
    drain.drain(0.05)  # while a call hangs
    release.set()
    assert "still run after 0.05 s" in capsys.readouterr().err


@pytest.fixture
def handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [(number, signal.getsignal(number)) for number in numbers]
    yield
    for number, handler in before:
        signal.signal(number, handler)


class Drained:
    """A drain that ends when told, with what the main thread does meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.end = threading.Event(), threading.Event()
        monkeypatch.setattr(drain, "drain", self._drain)
        monkeypatch.setattr(drain.ray, "is_initialized", lambda: True)
        before = signal.getsignal(signal.SIGTERM)
        drain.Stopping(LIMIT_S).arm()
        wait_until(lambda: signal.getsignal(signal.SIGTERM) != before)

    def _drain(self, limit_s: float) -> None:
        assert limit_s == LIMIT_S
        self.thread = threading.current_thread()
        self.begun.set()
        self.end.wait(LIMIT_S)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_once_when_drained(handlers, monkeypatch, number):
    drained = Drained(monkeypatch)
    send(number)
    wait_until(drained.begun.is_set)
    with pytest.raises(KeyboardInterrupt):
        drained.end.set()
        wait_until(lambda: False)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_end_of_the_drain_does_not_interrupt_what_the_second_signal_began(
    handlers, monkeypatch, first, second
):
    drained = Drained(monkeypatch)
    send(first)
    wait_until(drained.begun.is_set)
    with pytest.raises(KeyboardInterrupt):
        send(second)
        wait_until(lambda: False)
    drained.end.set()
    wait_until(lambda: not drained.thread.is_alive())
    time.sleep(0.01)  # a signal would come now
    with pytest.raises(KeyboardInterrupt):  # while the user's third does
        send(first)
        wait_until(lambda: False)


def test_takes_over_sigterm_after_ray_has_set_its_handler(handlers, monkeypatch):
    initialized = threading.Event()
    monkeypatch.setattr(drain, "POLL_S", 0.001)
    monkeypatch.setattr(drain.ray, "is_initialized", initialized.is_set)
    drain.Stopping(LIMIT_S).arm()

    def rays(number: int, frame: object) -> None:
        raise SystemExit(number)

    signal.signal(signal.SIGTERM, rays)
    initialized.set()
    wait_until(lambda: signal.getsignal(signal.SIGTERM) != rays)
