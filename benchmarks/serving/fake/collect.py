"""Garbage collection in a server's processes, whose other memory is then what they hold."""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import time
from typing import Any

import ray

logger = logging.getLogger(__name__)


def collect_often(interval_s: float) -> None:
    """Collect garbage in all named actors every `interval_s` seconds, from a thread of its own.

    What Python and the C library keep to themselves between collections goes up and down by more
    than a small leak in many requests would add.
    """
    threading.Thread(target=_collect_forever, args=(interval_s,), daemon=True).start()


def _collect_forever(interval_s: float) -> None:
    while True:
        time.sleep(interval_s)
        try:
            ray.get([actor.__ray_call__.remote(_collect) for actor in _named_actors()])
        except Exception as error:  # the server is being shut down, or an actor died
            logger.warning("no garbage collected: %s", error)


def _named_actors() -> list[Any]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [ray.get_actor(each["name"], namespace=each["namespace"]) for each in named]


def _collect(actor: object) -> None:
    """Runs in the actor."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
