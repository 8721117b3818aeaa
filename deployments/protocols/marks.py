"""Marks in a text that comes in pieces."""

from __future__ import annotations


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that a mark begins with."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)
