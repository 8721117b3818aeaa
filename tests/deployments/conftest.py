"""An engine actor without Ray, around a core whose steps take a millisecond."""

from functools import partial
from typing import Any

import pytest

from deployments import crash_dump, watchdog
from deployments.engine_actor import EngineActor
from engine.config import EngineConfig
from tests.deployments.fake_core import FakeCore


@pytest.fixture(autouse=True)
def ended(monkeypatch, tmp_path) -> list[Any]:
    """Which processes would have been ended; crash dumps go to `tmp_path`, and nobody is late."""
    said: list[Any] = []
    monkeypatch.setattr(watchdog, "end_process", lambda: said.append("itself"))
    monkeypatch.setattr(watchdog, "kill_process", lambda pid: said.append(("killed", pid)))
    monkeypatch.setattr(watchdog, "ask_for_stacks", lambda pid: said.append(("asked", pid)))
    monkeypatch.setattr(watchdog, "LOOK_S", 0.02)
    monkeypatch.setattr(crash_dump, "default_folder", lambda: tmp_path)
    return said


@pytest.fixture
async def actor():
    started = EngineActor(EngineConfig(max_num_seqs=8), partial(FakeCore, step_s=0.001))
    await started.start()
    yield started
    await started.drain()
