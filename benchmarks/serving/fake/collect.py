"""Garbage collection in a server's processes, whose other memory is then what they hold."""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

logger = logging.getLogger(__name__)


@contextmanager
def collecting(interval_s: float) -> Iterator[None]:
    """Collect garbage in all named actors every `interval_s` seconds, from a thread of its own.

    What Python and the C library keep to themselves between collections goes up and down by more
    than a small leak in many requests would add.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_collect_until, args=(ended, interval_s))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # what it calls would start Ray anew after a shutdown


def _collect_until(ended: threading.Event, interval_s: float) -> None:
    while not ended.wait(interval_s):
        try:
            ray.get([actor.__ray_call__.remote(_collect) for actor in _named_actors()], timeout=30)
        except (ray.exceptions.RayError, ValueError) as error:  # an actor has just ended
            logger.warning("no garbage collected: %s", error)


def _named_actors() -> list[Any]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [ray.get_actor(each["name"], namespace=each["namespace"]) for each in named]


def _collect(actor: object) -> None:
    """Runs in the actor."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
