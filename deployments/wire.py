"""What crosses processes between ingress, engine replica and engine actor: msgspec structs."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from deployments.load_meter import EngineUse
from engine.outputs import EngineLoad, TokenDelta
from engine.request import EngineRequest


class Submission(msgspec.Struct, array_like=True):
    """A request and the subscriber whose trunk its tokens ride; fields are only ever appended."""

    subscriber_id: str
    request: EngineRequest
    blocks: list[bytes] = []
    """Of the request, for other ingress replicas to know; see `request_blocks`."""
    origin: str = ""
    """Id of the client's request that it comes of, for the log."""


class TrunkMessage(msgspec.Struct, array_like=True):
    """What one or more engine steps produced for one subscriber; fields are only ever appended."""

    deltas: list[TokenDelta]
    load: EngineLoad
    reflected: list[str] = []
    """Requests of this subscriber that `load` counts from now on."""
    heard: list[list[bytes]] = []
    """Blocks of requests that other subscribers have sent here."""


class EndNotice(msgspec.Struct, array_like=True):
    """A request that has ended; fields are only ever appended."""

    request_id: str
    reason: str
    """A finish reason; `abort` when somebody asked for the end."""
    num_tokens: int
    """Tokens that this engine generated for it."""


class EngineReport(msgspec.Struct, array_like=True):
    """What an engine tells its own replica; fields are only ever appended."""

    ended: list[EndNotice]
    load: EngineLoad
    dead: str | None = None
    """Why the loop has ended, when it has."""
    progress_age_s: float = 0.0
    """Seconds since the loop last finished a step or woke up idle."""
    use: EngineUse = EngineUse()
    """What the autoscaler decides from."""


T = TypeVar("T")

encode = msgspec.msgpack.Encoder().encode
"""Any of these structs to bytes."""
decode_submissions = msgspec.msgpack.Decoder(list[Submission]).decode
decode_trunk_message = msgspec.msgpack.Decoder(TrunkMessage).decode
decode_report = msgspec.msgpack.Decoder(EngineReport).decode


def merge_delta(into: TokenDelta, newer: TokenDelta) -> None:
    """Append `newer` to `into`, a delta of the same request; afterwards both count as one step."""
    into.token_ids += newer.token_ids
    into.logprobs = _join(into.logprobs, newer.logprobs)
    into.prompt_logprobs = _join(into.prompt_logprobs, newer.prompt_logprobs)
    into.finish_reason = newer.finish_reason or into.finish_reason
    into.stop_reason = into.stop_reason if newer.stop_reason is None else newer.stop_reason
    into.num_cached_tokens = max(into.num_cached_tokens, newer.num_cached_tokens)
    into.error = newer.error or into.error
    into.refused = newer.refused or into.refused
    into.param = newer.param or into.param
    into.pooled = newer.pooled or into.pooled
    into.queued_s = into.queued_s or newer.queued_s
    into.prefill_s = into.prefill_s or newer.prefill_s


def _join(first: list[T] | None, second: list[T] | None) -> list[T] | None:
    return [*(first or ()), *(second or ())] if first or second else first
