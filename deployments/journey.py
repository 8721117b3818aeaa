"""What becomes of the requests of one call, on their way through engines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Journey:
    """Kept by who sends the requests, and written by their flights."""

    request_id: str = ""
    """Of the client's request, for the lines that engines log."""
    sent_at: float = field(default_factory=time.monotonic)
    """When they were sent, in seconds of `time.monotonic`."""
    engines: list[str] = field(default_factory=list)
    """Ids of the engines that told of them, in order."""
    moved_at: list[float] = field(default_factory=list)
    """When one of them had to go on elsewhere, likewise."""

    def meet(self, engine_id: str) -> None:
        """Note that an engine has told of a request."""
        if engine_id not in self.engines:
            self.engines.append(engine_id)
