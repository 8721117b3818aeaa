"""Ray Serve's own rule for the number of replicas, to compare with.

Serve has no public way to its code for delays: the import here is private, of the version that is
pinned, and `tests/cluster/simulate/test_scaling.py` tells when it does something else.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig

from cluster.autoscaling import Observation

LOOK_BACK_S = 10.0
"""Over which Serve averages requests."""


@dataclass
class ByRequests:
    """Serve's own rule: so many requests under way an engine, and Serve's code for delays."""

    target_ongoing_requests: float
    upscale_delay_s: float
    downscale_delay_s: float
    _counts: deque[tuple[float, float]] = field(default_factory=deque)
    _state: dict[str, Any] = field(default_factory=dict)

    def __call__(self, seen: Observation, now: float) -> int:
        """See `ChooseSize`."""
        running = sum(engine.running + engine.waiting for engine in seen.engines)
        self._counts.append((now, running + seen.held))
        while self._counts[0][0] <= now - LOOK_BACK_S:
            self._counts.popleft()
        mean = sum(count for _, count in self._counts) / len(self._counts)
        config = AutoscalingConfig(
            upscale_delay_s=self.upscale_delay_s, downscale_delay_s=self.downscale_delay_s
        )
        wanted = math.ceil(mean / self.target_ongoing_requests)
        size, self._state = _apply_delay_logic(wanted, seen.target, config, self._state, now)
        return max(seen.least, min(int(size), seen.most))
