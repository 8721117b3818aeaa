"""A bench of toy sizes whose clock counts measurements, for tests of probes without a GPU."""

import torch

from benchmarks.probes.bench import Bench, Sustained
from benchmarks.roofline import Shape

torch.set_num_threads(1)
TINY = Shape(
    layers=2, hidden=32, heads=4, kv_heads=2, head_dim=16, mlp=48, vocabulary=600, itemsize=2
)
SHAPES = {"tiny": TINY}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ToyBench(Bench):
    """Runs each call twice; the n-th measurement takes n µs."""

    def __init__(self, cold_bytes=1):
        # float16, as Triton's interpreter computes products in bfloat16 wrongly.
        super().__init__(DEVICE, torch.float16, cold_bytes)
        self.outputs = []

    def time(self, calls):
        self.outputs.append([call() for call in [*calls, *calls]])
        return float(len(self.outputs))

    def burst(self, call):
        return [self.time([call]), 1e6, 1.0]

    def sustain(self, calls, seconds):
        first = self.time(calls)
        sample = {"clocks.sm": "1400", "clocks_event_reasons.sw_power_cap": "Active"}
        return Sustained([first, first, 2 * first, 2 * first], [sample])
