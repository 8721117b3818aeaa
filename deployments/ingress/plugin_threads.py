"""Threads for the code of plug-ins, which may never come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

THREADS = 4
"""That work at a time."""
TIME_LIMIT_S = 60.0
"""For one piece of work. Nothing can end a thread: one that takes longer is left behind."""
MAX_LEFT_BEHIND = 16
"""Threads. With so many no more work is begun until one comes back; what has begun before may stay
behind as well."""


class PluginThreads:
    """A few threads, and more in the place of those that do not come back."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(THREADS)
        self._threads = ThreadPoolExecutor(THREADS + MAX_LEFT_BEHIND, thread_name_prefix="plugin")
        self._num_left_behind = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Do work in a thread, when it is its turn.

        Raises:
            TimeoutError: it takes too long, or too much that was begun earlier has not ended.
        """
        async with self._turns:
            if self._num_left_behind >= MAX_LEFT_BEHIND:
                raise TimeoutError
            done = asyncio.get_running_loop().run_in_executor(self._threads, work)
            try:
                # Python 3.11's `wait_for` may lose the cancellation by a client that leaves.
                async with asyncio.timeout(TIME_LIMIT_S):
                    # Were it cancelled, nobody would be told when the thread comes back.
                    return await asyncio.shield(done)
            finally:
                if not done.done():
                    self._num_left_behind += 1
                    done.add_done_callback(self._come_back)

    def _come_back(self, done: asyncio.Future[T]) -> None:
        self._num_left_behind -= 1
        if not done.cancelled():
            done.exception()  # nobody else will ask for it
