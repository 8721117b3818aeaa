import os
import subprocess
from contextlib import suppress
from typing import Any

import pytest

from engine.startup import SPIN_COUNT

# As `start_engine` does; torch may be imported before it here.
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

_lost_workers: list[str] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Note how a worker of xdist that was lost has ended; by itself it may say nothing."""
    if error:
        process = node.gateway._io.popen
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        _lost_workers.append(f"{node.gateway.id} was lost; its status: {process.returncode}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in _lost_workers:
        terminalreporter.write_line(line)
