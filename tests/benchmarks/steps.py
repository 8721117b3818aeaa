"""Step records for tests."""

from dataclasses import dataclass


@dataclass
class Step:
    rows: int = 2
    tokens: int = 2
    context_tokens: int = 20
    decode: bool = True
    schedule_s: float = 0.001
    prepare_s: float = 0.002
    launch_s: float = 0.003
    wait_s: float = 0.004
    update_s: float = 0.005
    device_s: float | None = None
    idle_s: float | None = None
