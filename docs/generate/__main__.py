"""Writes the pages that are made from the code."""

from __future__ import annotations

from pathlib import Path

from docs.generate.pages import PAGES

for path, page in PAGES.items():
    Path(path).write_text(page())
