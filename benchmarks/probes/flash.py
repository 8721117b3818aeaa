"""flash-attn, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

PAGE = 256
"""Smallest pages that its kernels take."""

MISSING = "the package flash-attn is not installed"


def find_flash_attn() -> Any:
    """The package, or None where it is missing."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn")
