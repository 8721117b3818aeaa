"""Which engines live, as far as the requests of lost engines need to know before they move."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.engine_state import EngineState

ANSWER_LIMIT_S = 0.3
"""An engine that lives answers within this when it is asked whether it does."""


class RollCall:
    """Who has shown life since a request was heard of. Not thread-safe; times are seconds.

    Where one engine was stopped others may have been, and what moved to one of them would wait
    there for that to be noticed.
    """

    def __init__(self) -> None:
        self._begun: dict[str, float] = {}
        """Request id → time from which on reports count."""
        self._awaited: set[str] = set()
        """Engines whose answers some request waits for."""

    def begin(self, request_id: str, now: float) -> None:
        """Count the reports from now on for a request."""
        self._begun[request_id] = now

    def end(self, request_id: str) -> None:
        """Forget a request."""
        self._begun.pop(request_id, None)

    def present(
        self, engines: Mapping[str, EngineState], request_id: str, now: float
    ) -> dict[str, EngineState]:
        """Those of the engines that have reported; none while others may be about to.

        Who answers first should not get all requests of a lost engine.
        """
        since = self._begun.get(request_id)
        if since is None:
            return dict(engines)
        silent = {i for i, state in engines.items() if not state.has_reported(since)}
        if silent and now - since < ANSWER_LIMIT_S:
            self._awaited |= silent
            return {}
        return {i: state for i, state in engines.items() if i not in silent}

    def hear(self, engine_id: str) -> bool:
        """Note that an engine has reported, or is lost; True if no other is awaited now."""
        was_last = self._awaited == {engine_id}
        self._awaited.discard(engine_id)
        return was_last
