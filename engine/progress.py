"""The progress bar of offline generation."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm

from engine.job import Job
from engine.output_processor import TextDelta


class Progress:
    """Counts finished prompts, and shows prefill and decode tokens a second.

    Both rates are tokens done over the time since the start, as the two phases share steps.
    """

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar = tqdm(total=total, desc="Prompts", disable=not enabled, dynamic_ncols=True)
        self._started = time.perf_counter()
        self._begun: set[str] = set()
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

    def update(self, job: Job, delta: TextDelta) -> None:
        """Count what a step added to a prompt's completion."""
        if job.request_id not in self._begun:
            self._begun.add(job.request_id)
            self._prefilled += len(job.prompt_token_ids)
        self._decoded += len(delta.token_ids)
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(
            f"prefill {self._prefilled / elapsed:.0f} tok/s, "
            f"decode {self._decoded / elapsed:.0f} tok/s",
            refresh=False,
        )
        if job.finished:
            self._bar.update()
