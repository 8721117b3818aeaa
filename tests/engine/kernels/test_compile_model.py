import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

MODEL = {
    "_take_tokens_kernel",
    "_rms_norm_kernel",
    "_silu_mul_kernel",
    "_skinny_kernel",
    "_rotate_and_store_kernel",
    "_decode_kernel",
    "_prefill_kernel",
}
HOPPERS = {"_wave_kernel"}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that a block may have (CUDA C++ Programming Guide, table of technical specifications)."""

PROCESSORS = {80: 108, 89: 58, 90: 132}
"""Of an A100, an L4 and an H200."""


# Each takes as long as a hundred other tests; a Hopper's kernels have most that can go wrong.
# test_compile.py compiles for an A100 what differs there.
@pytest.mark.parametrize(
    "capability",
    [pytest.param(80, marks=pytest.mark.slow), pytest.param(89, marks=pytest.mark.slow), 90],
)
def test_compiles_and_fits(capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.engine.kernels.compile_model", str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in compiled} == MODEL | (HOPPERS if capability >= 90 else set())
    assert max(int(shared) for _, shared in compiled) <= SHARED_MEMORY[capability]
