import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SAMPLING = {"_draw_kernel", "_threshold_kernel", "_apply_kernel", "_count_kernel"}


def test_compiles_for_an_a100(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.engine.kernels.compile_only", "80"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == SAMPLING
