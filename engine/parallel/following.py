"""What the ranks after the first do: the same steps, as they are told.

python -m engine.parallel.following FOLDER RANK
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from engine.errors import TrunklineError
from engine.parallel.meeting import Meeting
from engine.parallel.messages import decode
from engine.runner.build import build_runner, choose_device
from engine.runner.model_runner import ModelRunner, PendingStep
from engine.startup import Stopwatch, freeze_heap
from engine.step import StepPlan

READY = b"ready"
"""To meet the others, and again to do steps."""
LEFT_ALONE = 17
"""Exit status of a rank whose first rank is gone."""


def follow(meeting: Meeting, rank: int) -> None:
    """Run one rank for as long as the first one lives; never returns.

    The process ends with it, even from within an exchange that will never finish.
    """
    link = meeting.connect()
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(link, messages, meeting), daemon=True).start()
    try:
        device = choose_device(meeting.config)
        link.send_bytes(READY)
        group = meeting.join(rank, device)
        runner, _ = build_runner(meeting.config, Stopwatch(), group)
        freeze_heap()
        link.send_bytes(READY)
        _run(runner, messages)
    except BaseException as error:
        kind = "" if isinstance(error, TrunklineError) else f"{type(error).__name__}: "
        link.send_bytes(f"{kind}{error}".encode())
        raise


def _read(link: Connection, messages: queue.SimpleQueue[bytes], meeting: Meeting) -> None:
    try:
        while True:
            messages.put(link.recv_bytes())
    except (EOFError, OSError):
        meeting.clear_up()  # the first rank may have been killed
        os._exit(LEFT_ALONE)


def _run(runner: ModelRunner, messages: queue.SimpleQueue[bytes]) -> None:
    """Do each step that is told. Nobody asks for what it sampled: the first rank has the same."""
    pinned = runner.batch.device.type == "cuda"
    pending: PendingStep | None = None
    while True:
        message = decode(messages.get())
        if isinstance(message, StepPlan):
            pending = runner.execute(message)
        elif pending is not None:
            pending.sample(None if message is None else message.restore(pinned))


if __name__ == "__main__":
    follow(Meeting(Path(sys.argv[1])), int(sys.argv[2]))
