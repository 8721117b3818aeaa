"""How processes of this package's modules are started."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package.

    It imports nothing from the folder that the user happens to be in, whose modules may have the
    names of libraries.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment in which that finds what this process does, wherever it is."""
    folders = [*filter(None, sys.path), str(Path(__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
