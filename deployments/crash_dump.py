"""Writes down what an engine was at when it died: no prompt, no token, no sampling parameter.

A dump may be sent to whoever is asked for help. So the message of an exception is only in it where
it cannot quote a request; the log has it in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import ray

from engine.errors import InvalidRequest, StepFailed, TrunklineError
from engine.snapshot import EngineSnapshot

logger = logging.getLogger("trunkline.crash")

FIRST_DUMPS = 4
"""The oldest in a folder that are kept: where engines die again and again, the cause is there."""
LAST_DUMPS = 8
"""The newest that are kept; those between are deleted."""
WRITE_LIMIT_S = 5.0
"""A process that ends waits no longer for its dump, which may go to a folder over a network: its
replacement wants the device."""
PART_LIMIT_S = 60.0
"""A dump that has been written for longer was left by a process that was killed meanwhile."""
PREFIX = "trunkline-crash-"
PACKAGES = ("trunkline", "torch", "triton", "ray", "transformers", "flash-attn")
MAX_MESSAGE = 1000
"""Characters of an exception's message."""
_HARMLESS = ("CUDA error", "CUDA out of memory", "Triton Error [CUDA]")
"""How messages of the device begin where they come as a `RuntimeError`."""


def write_crash_dump(folder: str | None, reason: str, **details: Any) -> Path | None:
    """Write a dump, delete what is too many, and log where it is; what fails on the way is logged.

    Args:
        folder: None takes that of Ray's logs, which the dashboard shows.
        reason: `exception`, `stall`, …
        details: what more to write; anything that JSON or msgspec can express.

    Returns:
        The file; None if it could not be written.
    """
    now = datetime.now(UTC)
    try:
        dump = {
            "reason": reason,
            "time": now.isoformat(),
            "pid": os.getpid(),
            "versions": versions(),
            **details,
        }
        place = Path(folder) if folder else default_folder()
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{PREFIX}{now:%Y%m%dT%H%M%S.%f}-{os.getpid()}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(msgspec.to_builtins(dump, enc_hook=str), indent=1))
        part.rename(path)
    except Exception:
        logger.exception("no crash dump could be written")
        return None
    logger.error("crash dump (%s): %s", reason, path)
    _tidy(place)
    return path


def write_aside(write: Callable[[], object]) -> asyncio.Future[None]:
    """Describe and write a dump in a thread of its own, which no exit of the process waits for.

    The event loop has others to tell, and a write to a lost folder may block for ever.

    Returns:
        Done when it has been written or has failed, which is logged.
    """
    loop = asyncio.get_running_loop()
    written: asyncio.Future[None] = loop.create_future()

    def work() -> None:
        try:
            write()
        except Exception:  # the process ends all the same
            logger.exception("no crash dump could be written")
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(written.set_result, None)

    try:
        threading.Thread(target=work, name="crash-dump", daemon=True).start()
    except Exception:  # no more threads, or memory for one, are to be had
        logger.exception("no crash dump could be written")
        written.set_result(None)
    return written


def default_folder() -> Path:
    """Where Ray keeps the logs of this session; the temporary folder without Ray."""
    node = ray._private.worker._global_node
    return Path(node.get_logs_dir_path() if node else tempfile.gettempdir())


def versions() -> dict[str, str | None]:
    """Of Python, of the packages that matter, and of the CUDA that torch was built for."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch := sys.modules.get("torch"):  # only the engine actor's process imports it
        found["cuda"] = torch.version.cuda
    return found


def describe_state(snapshot: EngineSnapshot | None) -> dict[str, Any] | None:
    """A snapshot for a dump, the load by the names of its figures."""
    if snapshot is None:
        return None
    return msgspec.structs.asdict(snapshot) | {"load": msgspec.structs.asdict(snapshot.load)}


def describe_error(error: BaseException) -> dict[str, Any]:
    """Type, place and cause of an exception, and its message where that is harmless."""
    kind = type(error)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    own = isinstance(error, TrunklineError) and not isinstance(error, InvalidRequest | StepFailed)
    harmless = own or isinstance(error, MemoryError) or kind.__module__ == "torch"
    if harmless or str(error).startswith(_HARMLESS):
        message = str(error)[:MAX_MESSAGE]
    else:
        message = "(in the log only, as it might quote a request)"
    return {
        "type": f"{kind.__module__}.{kind.__qualname__}",
        "message": message,
        "traceback": traceback.format_tb(error.__traceback__),
        "cause": describe_error(cause) if cause is not None else None,
    }


def thread_stacks() -> dict[str, list[str]]:
    """Stack of every thread of this process that Python knows, by its name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": traceback.format_stack(frame)
        for ident, frame in sys._current_frames().items()
    }


def _tidy(folder: Path) -> None:
    """Keep the first and the last dumps, whose names sort by time, and what is being written."""
    parts = folder.glob(f"{PREFIX}*.part")
    with contextlib.suppress(OSError):  # others tidy here too
        left = [part for part in parts if time.time() - part.stat().st_mtime > PART_LIMIT_S]
        for path in sorted(folder.glob(f"{PREFIX}*.json"))[FIRST_DUMPS:-LAST_DUMPS] + left:
            path.unlink(missing_ok=True)
