"""Sampling on a GPU: real sizes, and no wait for the device. Kernels: tests/engine/kernels."""

import itertools

import numpy as np
import pytest
import torch

from engine.sampling import Sampler
from engine.sampling.rows import Batch
from engine.sampling.warm_up import sampling_warm_ups
from tests.engine.kernels.fused import BATCHES, EOS
from tests.engine.kernels.test_fused_sampler import check_logprobs
from tests.engine.sampling_reference import new_row, params, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VOCAB = 152_064


def loaded_sampler(kind, rows, device):
    sampler = Sampler(256, VOCAB, device, EOS)
    for row in rows:
        option = params(**{**BATCHES[kind][row % len(BATCHES[kind])], "seed": row})
        sampler.add_row(new_row(row, option, [1, 2, 3, row], 3))
    return sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.5, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("kind", BATCHES)
def test_samples_as_on_the_cpu(kind, spread, dtype):
    rows = np.random.default_rng(3).permutation(256)[:24].tolist()
    on_cpu, on_gpu = (loaded_sampler(kind, rows, device) for device in (CPU, CUDA))
    for step in range(3):
        generator = torch.manual_seed(step)
        logits = (torch.randn(len(rows), VOCAB, generator=generator) * spread).to(dtype)
        positions = [4 + step] * len(rows)
        expected = sample(on_cpu, logits.clone(), rows, positions)
        got = sample(on_gpu, logits.to(CUDA), rows, positions)
        assert got.token_ids.tolist() == expected.token_ids.tolist()
        check_logprobs(got.host_logprobs(), expected.host_logprobs())


@pytest.mark.parametrize("kind", BATCHES)
def test_never_waits_for_the_device(kind):
    rows = list(range(64))
    logits = torch.randn(2, 64, VOCAB, device=CUDA).bfloat16()
    index = torch.tensor(rows, device=CUDA)
    sampler = loaded_sampler(kind, rows, CUDA)
    sample(sampler, logits[0], rows, [4] * 64)  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2):
            batch = Batch(rows, [4 + step] * 64, CUDA, index, index + step)
            sampler.sample(logits[step], batch)
            sampler.add_row(new_row(step, params(top_p=0.5, presence_penalty=1.0), [1, 2]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_request_waits_for_the_compiler(dtype):
    from engine.kernels.draw import _draw_kernel
    from engine.kernels.penalties import _apply_kernel, _count_kernel
    from engine.kernels.truncate import _threshold_kernel

    def variants():
        kernels = (_draw_kernel, _threshold_kernel, _apply_kernel, _count_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    for call in sampling_warm_ups(VOCAB, CUDA, dtype):
        call()
    warm = variants()
    for kind, batch in itertools.product(BATCHES, (1, 2, 3, 16, 63, 64, 65, 200)):
        rows = list(range(batch))
        logits = torch.zeros(batch, VOCAB, dtype=dtype, device=CUDA)
        sample(loaded_sampler(kind, rows, CUDA), logits, rows, [4] * batch)
    assert variants() == warm


@pytest.mark.parametrize(("kind", "launches"), [("greedy", 1), ("plain", 1), ("truncated", 2)])
def test_a_step_is_a_handful_of_launches(kind, launches):
    rows = list(range(64))
    logits = torch.randn(64, VOCAB, device=CUDA).bfloat16()
    batch = Batch(rows, [4] * 64, CUDA, torch.tensor(rows, device=CUDA))
    sampler = loaded_sampler(kind, rows, CUDA)
    sampler.sample(logits, batch)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        sampler.sample(logits, batch)
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(kernels) == launches, [event.name for event in kernels]
