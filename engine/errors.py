"""Exceptions that callers of the engine may see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.outputs import TokenDelta


class TrunklineError(Exception):
    """Base of every error that this project raises on purpose."""


class InvalidRequest(TrunklineError, ValueError):
    """A request that cannot be served as it is.

    Attributes:
        message: a sentence that says what is wrong and what to change.
        param: the offending field, named as the caller named it, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(TrunklineError, ValueError):
    """An engine option, model directory or model file that cannot be used."""


class StepFailed(TrunklineError, RuntimeError):
    """A step failed and took requests with it; the engine goes on without them.

    The message is for whoever runs the engine; it says what to change where that is known.

    Attributes:
        deltas: the ends of these requests, each with a sentence for its client. None, if all that
            were in the step are computed anew.
    """

    def __init__(self, message: str, deltas: list[TokenDelta]) -> None:
        super().__init__(message)
        self.deltas = deltas


class RankLost(TrunklineError, RuntimeError):
    """A rank of an engine has ended, or its ranks are out of step: the engine cannot go on."""


class EngineDead(TrunklineError, RuntimeError):
    """The engine's loop has stopped; its unfinished requests are lost to it."""
