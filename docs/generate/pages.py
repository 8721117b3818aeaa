"""The pages that are made from the code."""

from __future__ import annotations

from collections.abc import Callable

from docs.generate.api_reference import api_reference
from docs.generate.compatibility import compatibility

PAGES: dict[str, Callable[[], str]] = {
    "docs/api-reference.md": api_reference,
    "docs/compatibility.md": compatibility,
}
"""File, from the root of the repository, → what makes it."""
