"""Requests that go on elsewhere, and their tokens."""

from __future__ import annotations

from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8, 9]


def request(request_id: str, max_tokens: int = 60, **params) -> EngineRequest:
    return EngineRequest(
        request_id, PROMPT, SamplingParams(max_tokens=max_tokens, seed=1, **params)
    )


async def take(generation, tokens: dict[str, list[int]], until: int) -> None:
    """Collect tokens until so many have come of one request."""
    async for deltas in generation:
        for delta in deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        if max(map(len, tokens.values())) >= until:
            return
