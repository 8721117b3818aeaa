"""Compiles the model's kernels for a GPU that is not there.

python -m <this module> CAPABILITY [few]

Prints name and bytes of shared memory of each compiled kernel.
"""

import sys
from types import SimpleNamespace

import torch
import triton

from engine.attention.triton_paged import TritonAttention
from engine.kernels import (
    activation,
    decode_attention,
    linear,
    norm,
    prefill_attention,
    rotary_cache,
    wave_linear,
)
from engine.kernels.activation import silu_mul
from engine.kernels.linear import skinny_linear
from engine.kernels.norm import rms_norm
from engine.kernels.rotary_cache import rotate_and_store
from engine.kernels.tokens import take_tokens
from engine.kernels.wave_linear import gated_wave_linear
from tests.engine.kernels.compile_only import AbsentGPU
from tests.engine.kernels.test_compile_model import PROCESSORS, SHARED_MEMORY
from tests.engine.paging import RandomStep, padded

HALF = torch.bfloat16
HEADS, KV_HEADS, HIDDEN, INNER = 28, 4, 3584, 18944
STEP = [(0, 1, 2000), (1, 20, 300)]
USUAL = (128, HALF, None)
"""Size of a head, type and window of most models."""
OTHERS = [(64, HALF, None), (128, HALF, 100), (256, HALF, None), (128, torch.float32, None)]
ON_HOPPERS = (512, torch.float32, None)


class AbsentGPUWithMemory(AbsentGPU):
    def __init__(self, capability):
        super().__init__(capability)
        properties = {"max_shared_mem": SHARED_MEMORY[capability]}
        self.utils = SimpleNamespace(get_device_properties=lambda index: properties)


def compile_instead_of_launching():
    launch = triton.JITFunction.run

    def compile_only(kernel, *args, warmup, **options):
        compiled = launch(kernel, *args, warmup=True, **options)
        print(kernel.__name__, compiled.metadata.shared)

    triton.JITFunction.run = compile_only


def choose_as_on(capability):
    """Kernels are called with tensors on the CPU; let them be launched as on the GPU."""
    chained = (activation, decode_attention, linear, norm, prefill_attention, rotary_cache)
    for module in (*chained, wave_linear):
        module.overlaps_launches = lambda device: capability >= 90
    for module in (decode_attention, linear, wave_linear):
        module.shared_memory = lambda device: SHARED_MEMORY[capability]
    for module in (decode_attention, linear, prefill_attention, wave_linear):
        module.num_processors = lambda device: PROCESSORS[capability]


def compile_layer_kernels():
    numbers = torch.zeros(3, dtype=torch.int64)
    take_tokens(numbers, numbers, numbers)
    rms_norm(torch.zeros(2, HIDDEN, dtype=HALF), torch.zeros(HIDDEN, dtype=HALF), 1e-6)
    silu_mul(torch.zeros(2, 2 * INNER, dtype=HALF))
    for rows in (1, 32, 64):
        x, residual = torch.zeros(rows, HIDDEN, dtype=HALF), torch.zeros(rows, 512, dtype=HALF)
        for outputs in (64, 512):
            weight = torch.zeros(outputs, HIDDEN, dtype=HALF)
            skinny_linear(x, weight, weight[:, 0].contiguous(), residual)
    backend = TritonAttention()
    for head_dim, normalised in ((128, True), (64, False)):
        cache = torch.zeros(backend.kv_cache_shape(1, 64, KV_HEADS, head_dim), dtype=HALF)
        qkv = torch.zeros(3, (HEADS + 2 * KV_HEADS) * head_dim, dtype=HALF)
        table, weight = torch.zeros(9, head_dim), torch.zeros(head_dim, dtype=HALF)
        norms = (weight, weight) if normalised else None
        caches = backend.slots(cache)
        rotate_and_store(qkv, numbers, numbers, table, caches, HEADS, norms, 1e-6)


def compile_waves():
    x = torch.zeros(wave_linear.ROWS, HIDDEN, dtype=HALF)
    for outputs in (3584, 4608, 152_064):
        weight, residual = torch.zeros(outputs, HIDDEN, dtype=HALF), x.new_zeros(len(x), outputs)
        wave_linear.wave_linear(x, weight, weight[:, 0].contiguous(), residual)
    gated_wave_linear(x, torch.zeros(2 * INNER, HIDDEN, dtype=HALF))


def compile_attention(head_dim, dtype, window):
    step = RandomStep(TritonAttention(), STEP, 64, HEADS, KV_HEADS, head_dim, dtype)
    for layout in (step.layout, padded(step.layout, 8)):  # the latter as in a graph
        step.backend.attend(step.query, step.cache, step.backend.prepare(layout), 1.0, window)


def main():
    capability, few = int(sys.argv[1]), "few" in sys.argv
    triton.runtime.driver.set_active(AbsentGPUWithMemory(capability))
    compile_instead_of_launching()
    choose_as_on(capability)
    compile_layer_kernels()
    if capability >= 90:
        compile_waves()
    cases = [] if few else [*OTHERS, *([ON_HOPPERS] if capability >= 90 else [])]
    for case in (USUAL, *cases):
        compile_attention(*case)


if __name__ == "__main__":
    main()
