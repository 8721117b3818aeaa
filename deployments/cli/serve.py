"""`trunkline serve`: the launcher, with settings from the command line."""

from __future__ import annotations

import argparse

from deployments.cli.settings import read_settings
from deployments.launch import launch
from deployments.serve_config import written


def run(options: argparse.Namespace) -> int:
    """Run a server until it is told to stop; returns the exit status.

    Raises:
        ConfigError: the configuration is wrong, or the port taken.
    """
    path, values, changed = read_settings(options)
    if not changed:
        return launch(path)
    with written(values) as changed_path:
        return launch(changed_path)
