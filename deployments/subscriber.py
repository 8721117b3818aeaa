"""The engine actor's end of a trunk."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from deployments.mailbox import Mailbox

HEARD_KEPT = 256
"""A trunk carries the blocks of so many requests of others at most; older ones are dropped."""
UNREAD_MESSAGES = 16
"""Messages that a trunk carries ahead of its reader's acknowledgement; then it merges steps.

Ray's own backpressure does the same with a reply for every message, at more CPU time on both sides.
"""


class Subscriber:
    """One trunk: the mailbox, the requests whose tokens ride it, and what the load counts."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self.request_ids: set[str] = set()
        self.reader = 0
        """Number of the reader now attached, or 0."""
        self.heard_from = time.monotonic()
        self.room = asyncio.Semaphore(UNREAD_MESSAGES)
        self.last_sent = 0.0
        self.submitted: deque[tuple[int, str]] = deque()
        """Requests that the load does not count yet, each with its number among all submitted."""
        self.reflected: list[str] = []
        self.heard: deque[list[bytes]] = deque(maxlen=HEARD_KEPT)
        """Blocks of the requests of others."""

    def attach(self, reader: int) -> None:
        """Serve a new reader, or 0 for none; the one before it ends."""
        self.reader = reader
        self.heard_from = time.monotonic()
        self.room.release()
        self.room = asyncio.Semaphore(UNREAD_MESSAGES)
        self.mailbox.wake()  # the first message tells the load, and that the trunk is open

    def acknowledge(self, count: int) -> None:
        """Take over that so many more messages have been read.

        Whoever tells of none asks for one, to see that the engine lives.
        """
        self.heard_from = time.monotonic()
        if count == 0:
            self.mailbox.wake()
        for _ in range(count):
            self.room.release()

    def settle(self, num_received: int) -> None:
        """Take over that the load counts the first `num_received` requests of all submitted."""
        while self.submitted and self.submitted[0][0] <= num_received:
            self.reflected.append(self.submitted.popleft()[1])

    def take_news(self) -> tuple[list[str], list[list[bytes]]]:
        """What is new of `reflected` and of `heard`."""
        news = self.reflected, list(self.heard)
        self.reflected = []
        self.heard.clear()
        return news
