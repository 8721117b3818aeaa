import pytest
import torch

from engine.errors import ConfigError
from engine.runner import build
from tests.engine.gpu import needs_gpu


@pytest.mark.parametrize("current", ["default", "another"])
def test_engines_run_on_the_default_stream(monkeypatch, current):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: "default")
    build._check_stream(torch.device("cpu"))
    if current == "default":
        build._check_stream(torch.device("cuda"))
        return
    with pytest.raises(ConfigError, match="outside of"):
        build._check_stream(torch.device("cuda"))


class TestOnGPU:
    pytestmark = needs_gpu

    def test_another_stream_is_refused(self):
        device = torch.device("cuda")
        build._check_stream(device)
        with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(ConfigError):
            build._check_stream(device)
