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


def compile_model(folder, capability, *words):
    """Compile in a process of its own; kernels must be those of the model, and fit."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "tests.engine.kernels.compile_model", str(capability), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in compiled} == MODEL | (HOPPERS if capability >= 90 else set())
    assert max(int(shared) for _, shared in compiled) <= SHARED_MEMORY[capability]


# A Hopper's kernels have most that can go wrong. test_compile.py compiles for an A100 what differs
# there.
def test_compiles_and_fits(tmp_path):
    compile_model(tmp_path, 90, "few")


@pytest.mark.slow  # each takes as long as a hundred other tests
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_compiles_for_models_of_all_kinds(capability, tmp_path):
    compile_model(tmp_path, capability)
