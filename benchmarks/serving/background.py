"""Work in a thread of its own, beside a load."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_background(work: Callable[[], None], end: threading.Event) -> Iterator[None]:
    """Run `work` until the end of the `with`, which sets `end` and waits for it."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
