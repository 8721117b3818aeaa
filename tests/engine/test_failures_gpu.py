"""Real failures of a GPU: one that the engine outlives, and those that it must not hang on."""

import subprocess
import sys

import pytest
import torch

from engine.core import EngineCore
from tests.engine.conftest import tiny_config
from tests.engine.gpu import needs_gpu
from tests.engine.test_core_failures import PLACES, Failing, check, run, wires

pytestmark = needs_gpu

LOOP = """
import queue, sys
import torch
from engine.core import EngineCore
from engine.loop import EngineLoop
from tests.engine.conftest import request, tiny_config

core = EngineCore(tiny_config(sys.argv[1], device="cuda", max_num_seqs=4))
execute, steps, said, deaths = core.runner.execute, 0, queue.Queue(), queue.Queue()


def assert_on_device():
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]


def touch_foreign_memory():
    table = core.runner.batch.block_table
    core.runner.batch._take_blocks = lambda plan: table.fill(2**30)


def fail(plan):
    global steps
    steps += 1
    if steps == 5:
        globals()[sys.argv[2]]()
    return execute(plan)


core.runner.execute = fail
loop = EngineLoop(core, lambda deltas, load: said.put(deltas), deaths.put)
loop.submit([request(f"r{i}", [i + 1, 2, 3], max_tokens=40) for i in range(8)])
ended = {}
while len(ended) < 8:
    for delta in said.get(timeout=60):
        if delta.finish_reason is not None:
            assert delta.request_id not in ended
            ended[delta.request_id] = delta.finish_reason
print(sorted(set(ended.values())), deaths.get(timeout=60), flush=True)
"""


@pytest.mark.parametrize("failure", ["assert_on_device", "touch_foreign_memory"])
def test_a_lost_device_tells_everyone_and_ends_the_loop(tiny_model, failure):
    done = subprocess.run(
        [sys.executable, "-c", LOOP, tiny_model, failure],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    # How the process ends does not matter: that of a broken device may well abort at its exit.
    assert done.stdout.startswith("['error'] "), done.stderr
    assert "CUDA" in done.stdout or "device-side assert" in done.stdout


def out_of_memory():
    torch.empty(2**50, dtype=torch.uint8, device="cuda")
    raise AssertionError("there was room for a pebibyte")


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_without_memory_is_tried_again_once(tiny_model, place, eager):
    options = {"device": "cuda", "max_num_seqs": 4, "dtype": "float32", "enforce_eager": eager}
    core = EngineCore(tiny_config(tiny_model, **options))
    undisturbed = run(core, wires())
    for step in (0, 3, 9):
        with Failing(core, {step: (place, out_of_memory)}):
            assert run(core, wires()) == undisturbed
        # The second step is a small one, which may well have nothing to sample.
        with Failing(core, {step: (place, out_of_memory), step + 2: ("before", out_of_memory)}):
            found = run(core, wires())
        check(found, undisturbed)
        assert "error" in found[1].values()
        assert run(core, wires()) == undisturbed
