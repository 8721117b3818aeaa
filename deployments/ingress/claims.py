"""What a request holds until its answer has been written."""

from __future__ import annotations

from contextlib import ExitStack
from contextvars import ContextVar

from deployments.ingress.gate import KeyUse

_CURRENT: ContextVar[Claims] = ContextVar("claims")


class Claims(ExitStack):
    """A stack of what is given back when an exchange ends, however it ends.

    Args:
        key: what the exchange's API key does.
    """

    def __init__(self, key: KeyUse) -> None:
        super().__init__()
        self.key = key
        self.is_cache_hit: bool | None = None
        """Whether the answer comes from the response cache; None where that was not asked."""

    def __enter__(self) -> Claims:
        """Make these the claims of the current task, which answers nothing else."""
        _CURRENT.set(self)
        return self


def current_claims() -> Claims:
    """Those of the exchange whose handler runs."""
    return _CURRENT.get()
