"""What a request holds until its answer has been written: a key's places, and memory."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.responses import Response

from deployments.ingress.bodies import Bodies
from deployments.ingress.exchange import PIECE_BYTES, Endpoint
from deployments.ingress.gate import KeyUse
from deployments.ingress.journal import Journal
from deployments.ingress.options import IngressOptions
from tests.deployments.exchange import Exchange
from tests.deployments.plane import open_plane

COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 2}
BEARER = {"Authorization": "Bearer sk-a"}


@pytest.fixture
async def limited(tmp_path):
    """A plane where the key sk-a may have 4 completions, and sk-b any number."""
    keys = tmp_path / "keys"
    keys.write_text("sk-a max_concurrent_requests=4\nsk-b\n")
    keys.chmod(0o600)
    async with open_plane(options=IngressOptions(api_keys_file=str(keys)), step_s=0.002) as plane:
        yield plane


def ask(plane: Any, **body: Any) -> Exchange:
    exchange = Exchange(plane.app, BEARER)
    exchange.feed(json.dumps({**COMPLETION, **body}).encode(), more=False)
    return exchange


@pytest.mark.parametrize("many", [{"n": 3}, {"prompt": ["a", "b", "c"]}])
async def test_a_key_is_limited_by_completions(limited, many):
    stream = ask(limited, **many, max_tokens=200, stream=True)
    stream.may_send.clear()
    await limited.until(lambda: stream.sent)
    refused = ask(limited, n=2)
    await asyncio.wait_for(refused.task, 5)
    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert "may have 4 completions" in str(refused.sent)
    one = ask(limited)
    await asyncio.wait_for(one.task, 5)
    other = {"Authorization": "Bearer sk-b"}
    free = await limited.http.post("/v1/completions", json={**COMPLETION, "n": 9}, headers=other)
    assert (one.status, free.status_code, stream.task.done()) == (200, 200, False)
    stream.leave()
    await stream.task
    for _ in range(3):
        all_at_once = ask(limited, n=4)
        await asyncio.wait_for(all_at_once.task, 5)
        assert all_at_once.status == 200


@pytest.mark.parametrize(
    ("many", "param"), [({"n": 5}, "n"), ({"prompt": ["a", "b", "c", "d", "e"]}, "prompt")]
)
async def test_more_than_a_key_may_ever_have_is_no_429(limited, many, param):
    response = await limited.http.post(
        "/v1/completions", json={**COMPLETION, **many}, headers=BEARER
    )
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert "its API key may have 4" in response.json()["error"]["message"]


async def test_logprobs_count_until_their_answer_has_been_written():
    async with open_plane() as plane:
        slow = Exchange(plane.app, {})
        slow.may_send.clear()
        slow.feed(json.dumps({**COMPLETION, "logprobs": 1}).encode(), more=False)
        await plane.until(lambda: slow.sent)
        assert plane.client.num_running == 0 and plane.model.logprobs.held == 4
        slow.may_send.set()
        await slow.task
        assert slow.status == 200 and plane.model.logprobs.held == 0


async def test_long_answers_are_written_piece_by_piece():
    """HTTP servers keep the whole of a message, however slowly its client reads."""
    content = bytes(range(256)) * 1000

    async def handle(request: Any, body: bytes) -> Response:
        return Response(content)

    endpoint = Endpoint(handle, Bodies(100, 100, 1.0), Journal())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await endpoint({**scope, "key_use": KeyUse()}, receive, send)

    exchange = Exchange(app, {})
    exchange.feed(b"", more=False)
    await asyncio.wait_for(exchange.task, 5)
    bodies = [message["body"] for message in exchange.sent[1:]]
    assert b"".join(bodies) == content and max(map(len, bodies)) <= PIECE_BYTES
    more = [message.get("more_body", False) for message in exchange.sent[1:]]
    assert more == [True] * (len(bodies) - 1) + [False]
    assert exchange.headers["content-length"] == str(len(content))
