"""The progress bar of offline generation."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts finished prompts, and shows prefill and decode tokens a second.

    Both rates are tokens done over the time since the start, as the two phases share steps.
    """

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar = tqdm(total=total, desc="Prompts", disable=not enabled, dynamic_ncols=True)
        self._started = time.perf_counter()
        self._prefilled = 0
        self._decoded = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, prefilled: int, decoded: int, finished_prompts: int) -> None:
        """Add prompt tokens and output tokens done, and prompts finished."""
        self._prefilled += prefilled
        self._decoded += decoded
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(
            f"prefill {self._prefilled / elapsed:.0f} tok/s, "
            f"decode {self._decoded / elapsed:.0f} tok/s",
            refresh=False,
        )
        self._bar.update(finished_prompts)
