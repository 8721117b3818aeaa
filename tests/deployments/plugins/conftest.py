import pytest

from tests.deployments.plugins.asking import Ask, open_with


@pytest.fixture
async def plane():
    async with open_with(Ask) as opened:
        yield opened
