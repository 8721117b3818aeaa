"""`serve run` that lets requests end first: `python -m deployments.drain SECONDS run …`.

At the first SIGINT or SIGTERM every ingress replica refuses what is new. Serve shuts down when the
answers that had begun are written, after SECONDS, or at the next of these signals. (By itself it
would end its proxies, and with them all streams, at once; at SIGTERM without shutting down.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.scripts import cli

from deployments.names import INGRESS

POLL_S = 0.2
ANSWER_LIMIT_S = 2.0
"""Replicas that do not answer within this time are asked again."""
LAST_BYTES_S = 0.5
"""Proxies may take this long to pass on the last of an answer."""
_WAKE = signal.SIGUSR1
"""By which threads have the main one look what there is to do: only it may set handlers."""
_NOT_BEGUN = ("STARTING", "STOPPED")
"""States of replicas that have no requests."""


def main() -> None:
    """Run a command of Serve's, with SIGINT and SIGTERM as above."""
    Stopping(float(sys.argv.pop(1))).arm()
    cli()


class Stopping:
    """Turns the first request to stop into a drain, and its end or the second into an interrupt.

    Args:
        limit_s: how long the drain may take.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._begun = False
        self._drained = False
        self._ended = False

    def arm(self) -> None:
        """Handle the signals from now on, SIGTERM as soon as Ray has set its own handler."""
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(_WAKE, self._look)
        threading.Thread(target=_wake_when_ray_runs, daemon=True).start()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._begun:
            self._end()
        self._begun = True
        # In a thread, as the interrupted one may be in the midst of a call.
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        try:
            drain(self._limit_s)
        finally:
            self._drained = True
            os.kill(os.getpid(), _WAKE)

    def _look(self, number: int, frame: FrameType | None) -> None:
        if self._ended:
            return  # what ends now must not be interrupted
        if self._drained:
            self._end()
        signal.signal(signal.SIGTERM, self._ask)

    def _end(self) -> None:
        self._ended = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        raise KeyboardInterrupt


def _wake_when_ray_runs() -> None:
    while not ray.is_initialized():
        time.sleep(POLL_S)
    os.kill(os.getpid(), _WAKE)


def drain(limit_s: float) -> None:
    """Return when no request is under way any more, or after so many seconds."""
    if not ray.is_initialized():
        return
    drained = threading.Event()

    async def drain_and_stay() -> None:
        await _drain()
        drained.set()
        await asyncio.Event().wait()  # Serve's controller would complain of a loop that is closed

    # In a thread: a call to a controller that hangs has no time limit.
    threading.Thread(target=asyncio.run, args=(drain_and_stay(),), daemon=True).start()
    if not drained.wait(limit_s):
        print(f"trunkline: requests still run after {limit_s:g} s", file=sys.stderr)


async def _drain() -> None:
    """Return when every ingress replica has said that nothing is under way."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # handles tell of their making
    handles: dict[str, DeploymentHandle] = {}
    while await _is_busy(handles):
        await asyncio.sleep(POLL_S)
    await asyncio.sleep(LAST_BYTES_S)


async def _is_busy(handles: dict[str, DeploymentHandle]) -> bool:
    """Have all replicas refuse what is new; whether any has a request, or does not say.

    Args:
        handles: by application; those that lack are added.
    """
    try:
        applications = serve.status().applications
    except Exception:
        return True  # the controller is being replaced
    states = {
        name: application.deployments[INGRESS].replica_states
        for name, application in applications.items()
        if INGRESS in application.deployments
    }
    busy = [await _has_requests(handles, name, states[name]) for name in states]
    return any(busy)


async def _has_requests(
    handles: dict[str, DeploymentHandle], name: str, states: Mapping[str, int]
) -> bool:
    """Whether any replica of an application has, or does not say.

    One that does not answer may have streams all the same. One that Serve stops or has just found
    again is not asked by Serve, and counts until it has ended or is.
    """
    alive = sum(count for state, count in states.items() if state not in _NOT_BEGUN)
    if not alive:
        return False
    try:
        if name not in handles:
            # Not by `get_deployment_handle`: Serve keeps what that makes, and its shutdown fails at
            # a handle whose event loop is closed.
            handles[name] = DeploymentHandle(INGRESS, name)
        asked = handles[name].broadcast("drain")
        counts = await asked.results_async(timeout_s=ANSWER_LIMIT_S, return_exceptions=True)
    except Exception:
        return True  # nobody can be asked now, or somebody lags
    return len(counts) < alive or any(count != 0 for count in counts)


if __name__ == "__main__":
    main()
