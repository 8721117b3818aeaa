"""`serve run` that lets requests end first: `python -m deployments.drain SECONDS run …`.

At the first SIGINT every ingress replica refuses what is new. Serve shuts down when the answers
that had begun are written, after SECONDS, or at the next SIGINT. (By itself it would end its
proxies, and with them all streams, at once.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.scripts import cli

from deployments.names import INGRESS

POLL_S = 0.2
ANSWER_LIMIT_S = 10.0
"""Replicas that do not answer within this time are not waited for."""
LAST_BYTES_S = 0.5
"""Proxies may take this long to pass on the last of an answer."""


def main() -> None:
    """Run a command of Serve's, with SIGINT as above."""
    limit_s = float(sys.argv.pop(1))
    signal.signal(signal.SIGINT, lambda number, frame: _begin(limit_s))
    cli()


def _begin(limit_s: float) -> None:
    """Drain in a thread, as the interrupted one may be in the midst of a call; then interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_drain_and_interrupt, args=(limit_s,), daemon=True).start()


def _drain_and_interrupt(limit_s: float) -> None:
    try:
        if ray.is_initialized():
            asyncio.run(_drain(limit_s))
    finally:
        os.kill(os.getpid(), signal.SIGINT)


async def _drain(limit_s: float) -> None:
    """Return when no request is under way any more, or after so many seconds."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # handles tell of their making
    handles = [
        serve.get_deployment_handle(INGRESS, name)
        for name, app in serve.status().applications.items()
        if INGRESS in app.deployments and app.deployments[INGRESS].replica_states.get("RUNNING")
    ]
    try:
        async with asyncio.timeout(limit_s):
            while sum([await _count_running(handle) for handle in handles]):
                await asyncio.sleep(POLL_S)
            await asyncio.sleep(LAST_BYTES_S)
    except TimeoutError:
        print(f"trunkline: requests still run after {limit_s:g} s", file=sys.stderr)


async def _count_running(handle: DeploymentHandle) -> int:
    """Have all replicas refuse what is new, and count what they have begun."""
    counts: list[object] = []
    with contextlib.suppress(RayServeException, TimeoutError):
        async with asyncio.timeout(ANSWER_LIMIT_S):
            counts = await handle.broadcast("drain").results_async(return_exceptions=True)
    return sum(count for count in counts if isinstance(count, int))  # others are dead


if __name__ == "__main__":
    main()
