"""How long steps of each size take, and where a step that prefills had better end."""

from __future__ import annotations

from dataclasses import dataclass, field

WORTHWHILE = 0.05
"""Share of its time that ending a step early has to save: times of single runs are noisy."""
DECODE_WEIGHT = 0.8
"""What time counts that rows decode in, beside time that prompts wait.

With 1 prompts would wait for long, as many steps would each take a few tokens of them: in a
simulation (256 clients, 160 to 480 tokens in, 128 to 384 out) half of the first tokens then take
six times as long, and no more tokens come.
"""

_FEW_STEPS = 4


@dataclass(slots=True, frozen=True)
class StepTimes:
    """Seconds of a step by its size, measured over empty contexts; empty where they are unknown.

    Sizes rise, and with them the times: a step takes as long as the next size that was measured.
    """

    decode: dict[int, float] = field(default_factory=dict)
    """Rows of a step that only decodes → its seconds."""
    mixed: dict[int, float] = field(default_factory=dict)
    """Tokens of a step that prefills as well → its seconds."""
    token_s: float = 0.0
    """Seconds for each token of a step that is larger than any in `mixed`."""

    def end(self, taken: int, lacking: int, budget: int, decodes: int, batch: int) -> int:
        """How many tokens a step should have, if the next ones compute the others.

        A step reads all weights, whether it decodes, prefills or both: to rows that decode, up to
        some size, tokens of prompts add little. So prompts are best spread over the steps that
        these rows need anyway; the more so as products are far from smooth in their rows.

        Args:
            taken: tokens of the step so far.
            lacking: tokens of prompts that are left to compute.
            budget: most of these that the step may compute.
            decodes: rows of the step so far that will decode in the next one.
            batch: rows that will decode when all prompts have been computed.

        Returns:
            More than `taken`, at most `taken + min(lacking, budget)`.
        """
        total, most = taken + lacking, taken + min(lacking, budget)
        pace = self._pace(decodes, batch)
        if pace is None:
            return most
        whole = self._seconds(most)
        best, least = most, whole * (1 - WORTHWHILE) + pace.seconds(total - most)
        for size, seconds in reversed(self.mixed.items()):
            if taken < size < most and (all_s := seconds + pace.seconds(total - size)) < least:
                best, least = size, all_s
        return best

    def _pace(self, decodes: int, batch: int) -> _Pace | None:
        """How prompts are computed in the least time beside rows that decode."""
        full = next((seconds for size, seconds in self.decode.items() if size >= batch), None)
        rows = (decodes + batch - 1) // 2  # on the way, as prompts end one by one
        if full is None or not batch:
            return None
        worth = DECODE_WEIGHT * full * rows / batch
        paces = [
            _Pace(self, size - rows, seconds - worth, rows, worth)
            for size, seconds in self.mixed.items()
            if size > rows
        ]
        return min(paces, key=lambda pace: pace.step_s / pace.tokens, default=None)

    def _seconds(self, tokens: int) -> float:
        known = (seconds for size, seconds in self.mixed.items() if size >= tokens)
        return next(known, tokens * self.token_s)


@dataclass(slots=True, frozen=True)
class _Pace:
    """Steps of the same size, each of which computes `tokens` of prompts beside `rows` others.

    `step_s` is less what the others are worth: their share of a step that decodes a full batch.
    """

    times: StepTimes
    tokens: int
    step_s: float
    rows: int
    worth: float

    def seconds(self, tokens: int) -> float:
        """For so many tokens of prompts.

        Beyond a few steps others will have come to fill the last one.
        """
        if tokens > _FEW_STEPS * self.tokens:
            return self.step_s * tokens / self.tokens
        steps, left = divmod(tokens, self.tokens)
        last = self.times._seconds(self.rows + left) - self.worth if left else 0.0
        return steps * self.step_s + last


UNKNOWN_TIMES = StepTimes()
"""Of an engine that did not measure its steps."""
