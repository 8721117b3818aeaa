"""The `openai` package for Node, in node/client.test.js."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "node"


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node 20 or later, and npm")
def test_node_client(server):
    assert (FOLDER / "node_modules").is_dir(), "run `npm ci` in tests/clients/node"
    told = {"BASE_URL": server.base_url, "MODEL": server.model, "KEY": server.key}
    run = subprocess.run(
        ["node", "--test", "--test-reporter=spec"],
        check=False,
        cwd=FOLDER,
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
