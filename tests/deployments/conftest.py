"""An engine actor without Ray, around a core whose steps take a millisecond; and a plane around
a real engine with tiny weights."""

import math
import threading
import time
from functools import partial
from typing import Any

import pytest

from deployments import crash_dump, watchdog
from deployments.engine_actor import EngineActor
from deployments.engine_client import Generation
from engine.config import EngineConfig
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer
from tests.deployments.fake_core import FakeCore
from tests.deployments.plane import open_plane
from tests.engine.byte_model import write_byte_model
from tests.engine.conftest import TINY_LLAMA, tiny_config


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


@pytest.fixture
async def plane():
    async with open_plane() as opened:
        yield opened


@pytest.fixture
def one_by_one(monkeypatch):
    """A core steps when the reader asks for more, however slow the machine: no tokens are merged.

    For one request at a time, or more that are read together.
    """
    asked: set[str] = set()
    ask, step = Generation.__anext__, FakeCore.step

    def ask_and_tell(generation):
        asked.update(generation._flights)
        return ask(generation)

    def step_when_asked(core):
        due = time.monotonic() + 0.1  # then the actor may want to abort what nobody asks for
        while not (told := asked.intersection(core._requests)) and time.monotonic() < due:
            time.sleep(0.001)
        asked.difference_update(told)
        return step(core) if told else []

    monkeypatch.setattr(Generation, "__anext__", ask_and_tell)
    monkeypatch.setattr(FakeCore, "step", step_when_asked)


@pytest.fixture
def most(monkeypatch) -> dict[str, int]:
    """So many tokens a core brings of a request, by its id ("" for any other), until told anew.

    So that a request still runs when a test comes to what it does meanwhile, however slow the
    machine. Tries elsewhere count with the first one's tokens. Needs a `step_s`, or the core spins.
    """
    most: dict[str, int] = {}
    step = FakeCore.step

    def is_held(core, request_id):
        limit = most.get(request_id.partition("~")[0], most.get("", math.inf))
        return core._done[request_id] >= limit

    def step_others(core):
        held = {i: core._requests.pop(i) for i in list(core._requests) if is_held(core, i)}
        deltas = step(core)
        core._requests |= held
        return deltas

    monkeypatch.setattr(FakeCore, "step", step_others)
    return most


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A folder with a tiny model that knows bytes, and the same model by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-checkpoint")
    torch.manual_seed(0)
    sizes = {k: v for k, v in TINY_LLAMA.items() if k not in ("architectures", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).eval()
    model.save_pretrained(folder)
    write_byte_model(folder)
    return str(folder), model


@pytest.fixture
async def tiny_plane(tiny_checkpoint, monkeypatch):
    from engine.startup import start_engine

    folder, _ = tiny_checkpoint
    config = tiny_config(folder, load_format="auto", max_num_batched_tokens=16)
    monkeypatch.setattr("tests.deployments.plane.FakeCore", lambda _: start_engine(config))
    async with open_plane(tokenizer=Tokenizer.load(resolve_model(folder))) as opened:
        opened.model.vocab_size = TINY_LLAMA["vocab_size"]
        yield opened


@pytest.fixture
def hold_dump(monkeypatch):
    """Holds the crash dump that a module writes until the event is set; a list is told of it."""

    def hold(module, told):
        may_write = threading.Event()

        def write(*_, **__):
            may_write.wait(10)
            told.append("written")

        monkeypatch.setattr(module, "write_crash_dump", write)
        return may_write

    return hold
