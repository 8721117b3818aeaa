"""`trunkline bench`: hands over to the benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys

from deployments.cli.errors import CommandError


def run(options: argparse.Namespace) -> int:
    """Become `python -m benchmarks.SUITE`.

    Raises:
        CommandError: there are no benchmarks here, or none of this name.
    """
    # In a process of their own: they measure one, and know nothing of the deployments.
    if importlib.util.find_spec("benchmarks") is None:
        raise CommandError(
            "the benchmarks are not installed; run this in a checkout of the sources, after "
            "`pip install -e .`."
        )
    module = f"benchmarks.{options.suite}"
    if not re.fullmatch(r"[a-z_]+", options.suite) or importlib.util.find_spec(module) is None:
        raise CommandError(
            f"there is no benchmark '{options.suite}'; take offline, serving or sweep."
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *options.words])
