"""Long answers are sent in pieces."""

from __future__ import annotations

from typing import Any

from deployments.ingress.exchange import PIECE_BYTES, _in_pieces


class Sliced(bytes):
    """Counts the bytes that are copied out of it, and out of these."""

    copied = 0

    def __getitem__(self, place: Any) -> Any:
        found = Sliced(super().__getitem__(place))
        Sliced.copied += len(found)
        return found


async def test_a_long_answer_is_copied_once_to_be_sent():
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message["body"])
        assert message.get("more_body", False) is (len(sent) < 101)

    body = Sliced(bytes(range(250)) * (PIECE_BYTES * 100 // 250 + 1))
    await _in_pieces(send)({"type": "http.response.body", "body": body})
    assert b"".join(sent) == body and max(map(len, sent)) == PIECE_BYTES
    assert Sliced.copied <= len(body)
