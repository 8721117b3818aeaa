"""How long steps of each size take, and where a step that prefills had better end."""

from __future__ import annotations

from dataclasses import dataclass, field

WORTHWHILE = 0.08
"""Share of a step's time that ending it early has to save: times of single runs are noisy."""


@dataclass(slots=True, frozen=True)
class StepTimes:
    """Seconds of a step by its size, measured over empty contexts; empty where they are unknown.

    Sizes rise, and with them the times: a step takes as long as the next size that was measured.
    """

    decode: dict[int, float] = field(default_factory=dict)
    """Rows of a step that only decodes → its seconds."""
    mixed: dict[int, float] = field(default_factory=dict)
    """Tokens of a step that prefills as well → its seconds."""
    max_mixed_rows: int = 0
    """Rows of a step up to which `mixed` holds."""

    def split(self, num_decodes: int, num_rows: int, num_tokens: int, count: int) -> int:
        """How many of a last row's tokens a step should compute, if the next one does the rest.

        Rows that decode need that next step anyway, and products are far from smooth in their rows:
        it may be shorter to fill the step up to a good size, and to give the rest to the next one.

        Args:
            num_decodes: rows of one token that the next step will have as well.
            num_rows: of the step, the last one included.
            num_tokens: of the step without its last row.
            count: tokens that the last row lacks.

        Returns:
            1 to `count`.
        """
        whole = _seconds(self.mixed, num_tokens + count)
        decode = _seconds(self.decode, num_decodes)
        if whole is None or decode is None or num_rows > self.max_mixed_rows:
            return count
        best, least = count, whole * (1 - WORTHWHILE) + decode
        for size, seconds in reversed(self.mixed.items()):  # early is better
            now = size - num_tokens
            rest = _seconds(self.mixed, num_decodes + count - now)
            if 0 < now < count and rest is not None and seconds + rest < least:
                best, least = now, seconds + rest
        return best


UNKNOWN_TIMES = StepTimes()
"""Of an engine that did not measure its steps."""


def _seconds(times: dict[int, float], needed: int) -> float | None:
    """Of the smallest size that holds what is needed; None if there is none."""
    if not needed:
        return 0.0
    return next((seconds for size, seconds in times.items() if size >= needed), None)
