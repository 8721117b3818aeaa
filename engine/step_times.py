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
FEW_STEPS = 4
"""So far ahead the size of the last step is foreseen; beyond, others will have come to fill it."""


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
    max_rows: int = 0
    """Most rows of a step to which `mixed` applies."""

    def end(self, decodes: int, lacking: int, budget: int, batch: int, least: int = 1) -> int:
        """How many tokens a step should have, if the next ones compute the others.

        A step reads all weights, whether it decodes, prefills or both: to rows that decode, up to
        some size, tokens of prompts add little. So prompts are best spread over the steps that
        these rows need anyway; the more so as products are far from smooth in their rows.

        Args:
            decodes: rows that decode, a token each.
            lacking: tokens of prompts that are left to compute.
            budget: most of these that the step may compute.
            batch: rows that will decode when all prompts have been computed.
            least: fewest of these tokens that are worth computing.

        Returns:
            More than `decodes`, at most `decodes + min(lacking, budget)`.
        """
        total, most = decodes + lacking, decodes + min(lacking, budget)
        pace = self._pace(decodes, batch)
        if pace is None:
            return most
        best, lowest = most, self._whole(most) * (1 - WORTHWHILE) + self._later(total - most, pace)
        for size, seconds in reversed(self.mixed.items()):
            if decodes + least <= size < most:
                both = seconds + self._later(total - size, pace)
                if both < lowest:
                    best, lowest = size, both
        return best

    def _pace(self, decodes: int, batch: int) -> _Pace | None:
        """How prompts are computed in the least time beside rows that decode."""
        full = next((seconds for rows, seconds in self.decode.items() if rows >= batch), None)
        rows = (decodes + batch - 1) // 2  # on the way, as prompts end one by one
        sizes = [size for size in self.mixed if size > rows]
        if full is None or not sizes or rows < 1 or batch > self.max_rows:
            return None
        full = min(full, self.mixed[sizes[0]])  # a step that also prefills is no shorter
        worth = DECODE_WEIGHT * full * rows / batch
        size = min(sizes, key=lambda size: (self.mixed[size] - worth) / (size - rows))
        return _Pace(rows, worth, size - rows, self.mixed[size] - worth)

    def _later(self, tokens: int, pace: _Pace) -> float:
        """Seconds that so many tokens of prompts add to the steps after this one."""
        if tokens > FEW_STEPS * pace.tokens:
            return tokens * pace.step_s / pace.tokens
        steps, left = divmod(tokens, pace.tokens)
        last = self._whole(pace.rows + left) - pace.worth if left else 0.0
        return steps * pace.step_s + last

    def _whole(self, tokens: int) -> float:
        seconds = 0.0
        for size, seconds in self.mixed.items():
            if size >= tokens:
                return seconds
        return max(seconds, tokens * self.token_s)


@dataclass(slots=True, frozen=True)
class _Pace:
    """Steps of one size, each of which computes `tokens` of prompts beside `rows` that decode."""

    rows: int
    worth: float
    """Seconds that the rows are worth: their share of a step that decodes a full batch."""
    tokens: int
    step_s: float
    """Of a step, less `worth`."""


UNKNOWN_TIMES = StepTimes()
"""Of an engine that did not measure its steps."""
