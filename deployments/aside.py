"""Work that would hold up an event loop, done beside it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MAX_THREADS = 4
"""Tokenizing leaves the interpreter to others, so that a few threads gain time; more would take the
cores from the event loop, and from the engines of this machine."""

_threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="aside")


async def run_aside(work: Callable[[], T]) -> T:
    """Do work in one of a few threads that do nothing else, in the order of the calls.

    Not in the event loop's own threads: many long prompts would keep those from whoever opens a
    trunk. Work whose caller is cancelled before its turn is not done.
    """
    return await asyncio.get_running_loop().run_in_executor(_threads, work)
