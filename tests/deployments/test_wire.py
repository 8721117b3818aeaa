"""What crosses processes."""

from __future__ import annotations

from deployments.wire import merge_delta
from engine.outputs import TokenDelta


def test_a_refusal_stays_one_when_it_is_merged():
    delta = TokenDelta("r", [1])
    merge_delta(delta, TokenDelta("r", [], "error", error="too long.", refused=True))
    assert delta == TokenDelta("r", [1], "error", error="too long.", refused=True)


def test_a_vector_stays_when_it_is_merged():
    delta = TokenDelta("r", [])
    merge_delta(delta, TokenDelta("r", [], "stop", pooled=b"1234"))
    merge_delta(delta, TokenDelta("r", []))
    assert delta == TokenDelta("r", [], "stop", pooled=b"1234")
