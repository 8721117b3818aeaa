"""`trunkline serve`: the launcher, with settings from the command line."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import yaml

from deployments.cli.settings import read_settings
from deployments.launch import launch


def run(options: argparse.Namespace) -> int:
    """Run a server until it is told to stop; returns the exit status.

    Raises:
        ConfigError: the configuration is wrong, or the port taken.
    """
    path, values, changed = read_settings(options)
    if not changed:
        return launch(path)
    with tempfile.TemporaryDirectory(prefix="trunkline-") as folder:
        written = Path(folder) / "serve_config.yaml"
        written.write_text(yaml.safe_dump(values, sort_keys=False))
        return launch(written)
