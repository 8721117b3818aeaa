"""What `RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S` and the pods' grace period are for."""

import json
import subprocess
import sys

import pytest

from tests.cluster.documents import ROOT
from tests.cluster.leaving_node import STREAMS

DRAIN_S = 120
LIMIT_S = 400
TOKENS = 600
"""At 50 ms each: they last for half a minute."""


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_node_that_gets_sigterm_ends_its_answers_and_then_itself(tmp_path):
    command = [sys.executable, "-m", "tests.cluster.leaving_node", str(DRAIN_S), str(TOKENS)]
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            said, _ = process.communicate(timeout=LIMIT_S)
        finally:
            process.terminate()  # it ends what it has started
    assert process.returncode == 0, log.read_text()[-3000:]
    seen = json.loads(said.splitlines()[-1])
    assert seen["tokens"] == [TOKENS] * STREAMS
    assert seen["left_after_s"] < DRAIN_S, "it left because it was empty, not because time was up"
    assert seen["later"] == 8, "its successor serves"
