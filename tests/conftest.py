import faulthandler
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engine.startup import SPIN_COUNT

# As `start_engine` does; torch may be imported before it here.
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

FRAMES_TOLD = 12
_lost_workers: list[str] = []


def _stack_of(run: str, worker: str) -> Path:
    """Where a worker of xdist leaves the stack that it crashes with."""
    return Path(tempfile.gettempdir()) / f"trunkline-tests-{run}-{worker}"


def pytest_sessionstart(session: Any) -> None:
    if (worker := getattr(session.config, "workerinput", None)) is not None:
        path = _stack_of(worker["testrunuid"], worker["workerid"])
        session.crash_stack = path.open("w")
        faulthandler.enable(session.crash_stack, all_threads=False)


def pytest_sessionfinish(session: Any) -> None:
    if hasattr(session, "crash_stack"):
        Path(session.crash_stack.name).unlink()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Note how a worker of xdist that was lost has ended: its output does not tell."""
    if not error:
        return
    process, worker = node.gateway._io.popen, node.workerinput
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    _lost_workers.append(f"{worker['workerid']} was lost; its status: {process.returncode}")
    path = _stack_of(worker["testrunuid"], worker["workerid"])
    with suppress(FileNotFoundError):  # it never began
        _lost_workers.extend(path.read_text().splitlines()[:FRAMES_TOLD])
        path.unlink()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in _lost_workers:
        terminalreporter.write_line(line)
