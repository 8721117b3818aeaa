import pytest

from tests.deployments.plane import open_plane
from tests.deployments.test_chat_messages import repeater


@pytest.fixture
async def plane():
    """Its model repeats the last message up to a mark, as in the tests of chats."""
    async with open_plane(tokenizer=repeater()) as opened:
        yield opened
