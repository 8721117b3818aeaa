"""Ranks on GPUs: each engine in a process of its own, and one after another in the same."""

import faulthandler
import itertools
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import pytest
import torch

from engine.errors import RankLost
from engine.parallel.shared_memory import STUCK
from tests.engine.conftest import request, run_core
from tests.engine.test_core import prompts
from tests.engine.test_gpu import cuda_core, tiny_checkpoint  # noqa: F401  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
WAYS = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "kernels for few rows": {"dtype": "bfloat16"},
    "a type that NCCL alone sums": {"dtype": "float16"},
}


def in_a_process(work, *arguments):
    """What `work` gives in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def two_ranks(checkpoint, **options):
    return cuda_core(checkpoint, tensor_parallel_size=2, **options)


def few(count: int, name: str = "r", **options):
    return [request(f"{name}{i}", prompt, **options) for i, prompt in enumerate(prompts(count))]


def shared(core) -> bool:
    """Whether the ranks sum in memory that all reach."""
    return core.runner._runner.model.group.summand(1) is not None


def tokens_of_two(checkpoint, options):
    core = two_ranks(checkpoint, **options)
    return run_core(core, few(8, max_tokens=20)), shared(core)


@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_give_the_tokens_of_one(tiny_checkpoint, way):  # noqa: F811
    wanted = run_core(cuda_core(tiny_checkpoint), few(8, max_tokens=20))
    found, memory = in_a_process(tokens_of_two, tiny_checkpoint, WAYS[way])
    assert memory == (WAYS[way].get("dtype") != "float16")
    assert found.keys() == wanted.keys()
    if "dtype" not in WAYS[way]:
        assert found == wanted


def test_engines_come_one_after_another(tiny_checkpoint):  # noqa: F811
    """Each must leave its group as it goes; all but the first sum through NCCL."""
    wanted = run_core(cuda_core(tiny_checkpoint), few(8, max_tokens=20))
    for options in ({}, {"enforce_eager": True}, {}):
        assert tokens_of_two(tiny_checkpoint, options)[0] == wanted


def lose_a_rank(checkpoint, options):
    core = two_ranks(checkpoint, **options)
    (rank,) = (p for p in psutil.Process().children() if "following" in " ".join(p.cmdline()))
    threading.Timer(0.5, rank.kill).start()
    with pytest.raises(RankLost):
        for turn in itertools.count():
            run_core(core, few(8, name=f"turn {turn}, ", max_tokens=200))
    del core
    assert run_core(cuda_core(checkpoint), few(4, max_tokens=8))


def status_after(work, *arguments):
    """Exit status of a process that does `work`; one that hangs ends, and says where."""
    process = get_context("spawn").Process(target=limited, args=(work, *arguments))
    process.start()
    process.join()
    return process.exitcode


def limited(work, *arguments):
    faulthandler.dump_traceback_later(100, exit=True)
    work(*arguments)


def test_a_killed_rank_ends_the_engine_and_leaves_the_gpu_usable(tiny_checkpoint):  # noqa: F811
    assert status_after(lose_a_rank, tiny_checkpoint, {"dtype": "float16"}) == 0


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}])
def test_a_process_that_waits_for_a_killed_rank_in_shared_memory_ends(tiny_checkpoint, options):  # noqa: F811
    """Unless the rank was killed while the device had nothing to do."""
    assert status_after(lose_a_rank, tiny_checkpoint, options) in (STUCK, 0)
    assert run_core(cuda_core(tiny_checkpoint), few(4, max_tokens=8))
