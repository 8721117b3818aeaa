"""Sampling options of the commands."""

from __future__ import annotations

import argparse
from typing import Any

NAMES = ("max_tokens", "temperature", "seed")


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that the command line sets, under the names that bodies and `SamplingParams` share."""
    values = {name: getattr(options, name) for name in NAMES}
    return {name: value for name, value in values.items() if value is not None}
