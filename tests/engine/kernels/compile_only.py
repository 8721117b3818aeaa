"""Compiles sampling kernels for a GPU that is not there: python -m <this module> CAPABILITY.

The interpreter accepts what the compiler refuses, such as a loop variable that changes its type.
"""

import sys
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget

from engine.sampling import Sampler
from tests.engine.kernels.fused import BATCHES, EOS, fused_sample
from tests.engine.sampling_reference import new_row, params

CPU = torch.device("cpu")
VOCAB = 152_064


class AbsentGPU:
    """What the compiler asks of a driver."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_instead_of_launching():
    launch = triton.JITFunction.run

    def compile_only(kernel, *args, warmup, **options):
        launch(kernel, *args, warmup=True, **options)
        print(kernel.__name__)

    triton.JITFunction.run = compile_only


def main():
    triton.runtime.driver.set_active(AbsentGPU(int(sys.argv[1])))
    compile_instead_of_launching()
    for kind, batch in product(("plain", "truncated", "penalised"), (1, 64)):
        sampler = Sampler(batch, VOCAB, CPU, EOS)
        sampler.add_row(new_row(0, params(**BATCHES[kind][0]), [1]))
        logits = torch.zeros(batch, VOCAB, dtype=torch.bfloat16)
        fused_sample(sampler, logits, list(range(batch)), [1] * batch)


if __name__ == "__main__":
    main()
