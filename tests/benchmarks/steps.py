"""Step records for tests."""

from functools import partial

from engine import StepRecord

Step = partial(
    StepRecord,
    rows=2,
    tokens=2,
    context_tokens=20,
    decode=True,
    schedule_s=0.001,
    prepare_s=0.002,
    launch_s=0.003,
    wait_s=0.004,
    update_s=0.005,
)
