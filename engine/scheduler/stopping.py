"""When a request ends."""

from __future__ import annotations

from collections.abc import Collection

from engine.outputs import FinishReason
from engine.request import Request

GO_ON: tuple[None, None] = (None, None)


def check_stop(
    request: Request, token: int, eos_token_ids: Collection[int]
) -> tuple[FinishReason | None, int | None]:
    """Whether the request ends with `token`, which was just appended to it.

    Returns:
        (finish reason or None to go on, the stop token id unless it is the model's own).
    """
    params, length = request.params, len(request.token_ids)
    is_long_enough = length - request.num_prompt_tokens >= params.min_tokens
    if token in eos_token_ids:
        if is_long_enough and not params.ignore_eos:
            return "stop", None
        if params.structured_outputs is not None:
            return "stop", None  # the grammar allowed it, and allows nothing after it
    if is_long_enough and params.stop_token_ids and token in params.stop_token_ids:
        return "stop", token
    if length >= request.max_total_tokens:
        return "length", None
    return GO_ON
