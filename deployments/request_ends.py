"""Tells in an engine's log of the requests that have ended there."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from deployments.wire import EndNotice, Submission
from engine.outputs import TokenDelta

logger = logging.getLogger("trunkline.requests")


@dataclass(slots=True)
class _Begun:
    origin: str
    num_prompt_tokens: int
    first_at: float = 0.0
    num_cached_tokens: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0


class RequestEnds:
    """Knows of each request what its line will tell.

    Args:
        log_requests: whether all get a line; those that fail by the engine's fault do in any case.
    """

    def __init__(self, log_requests: bool) -> None:
        self._log_requests = log_requests
        self._begun: dict[str, _Begun] = {}

    def begin(self, item: Submission) -> None:
        """Note a request that has come."""
        request = item.request
        self._begun[request.request_id] = _Begun(item.origin, len(request.prompt_token_ids))

    def note_first(self, delta: TokenDelta) -> None:
        """Note what the delta of a request's first token tells of its start."""
        begun = self._begun.get(delta.request_id)
        if begun is not None:  # else it was aborted meanwhile
            begun.first_at = time.monotonic()
            begun.num_cached_tokens = delta.num_cached_tokens
            begun.queued_s, begun.prefill_s = delta.queued_s, delta.prefill_s

    def tell(self, notice: EndNotice, refused: bool) -> None:
        """Tell of a request that has ended.

        Args:
            notice: of its end.
            refused: whether an error is the request's own.
        """
        begun = self._begun.pop(notice.request_id)
        failed = notice.reason == "error" and not refused
        if not (failed or self._log_requests):
            return
        fields = {
            "request_id": begun.origin,
            "try_id": notice.request_id,
            "finish_reason": notice.reason,
            "prompt_tokens": begun.num_prompt_tokens,
            "cached_tokens": begun.num_cached_tokens,
            "output_tokens": notice.num_tokens,
            "queued_s": begun.queued_s,
            "prefill_s": begun.prefill_s,
            "decode_s": time.monotonic() - begun.first_at if begun.first_at else 0.0,
        }
        message = "request failed" if failed else "request ended"
        logger.log(logging.WARNING if failed else logging.INFO, message, extra=fields)
