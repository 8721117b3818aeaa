"""An engine actor without Ray, around a core whose steps take a millisecond."""

from functools import partial

import pytest

from deployments.engine_actor import EngineActor
from engine.config import EngineConfig
from tests.deployments.fake_core import FakeCore


@pytest.fixture
async def actor():
    started = EngineActor(EngineConfig(max_num_seqs=8), partial(FakeCore, step_s=0.001))
    await started.start()
    yield started
    await started.drain()
