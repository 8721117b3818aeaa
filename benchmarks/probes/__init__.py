"""Single operations on a GPU, timed alone: this engine's kernels, their rivals, and the ceilings.

    python -m benchmarks.probes --out probes.json
    python -m benchmarks.probes decode-attention rotary

Here alone do benchmarks reach behind the engine's public names: what is measured are its kernels.
"""
