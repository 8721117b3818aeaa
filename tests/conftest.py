import os
from typing import Any

import pytest

from engine.startup import SPIN_COUNT

# As `start_engine` does; torch may be imported before it here.
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Tell how a worker of xdist ended that was lost: a status, or a signal below zero."""
    if error:
        print(f"\n{node.gateway.id} ended with {node.gateway._io.popen.wait(10)}")
