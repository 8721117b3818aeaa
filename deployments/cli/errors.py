"""What ends a command."""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot go on; its text is the sentence that the user reads."""
