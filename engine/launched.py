"""What an engine's core asks of whatever computes its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.config import EngineConfig
from engine.runner.build import EngineInfo
from engine.sampling.token_masks import TokenMasks
from engine.startup import Stopwatch
from engine.step import StepPlan, StepResult


class PendingStep(Protocol):
    """A launched step, as a runner hands it out."""

    @property
    def prepare_s(self) -> float:
        """Seconds that its inputs took."""

    @property
    def launch_s(self) -> float:
        """Seconds that launching it took."""

    @property
    def timers(self) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        """Before its first and after its last kernel, when profiling."""

    def result(self) -> StepResult:
        """Wait for the step and bring its tokens to the host."""


class MaskedStep(PendingStep, Protocol):
    """A step whose plan names masked rows: it is sampled when they have their masks."""

    def sample(self, masks: TokenMasks | None) -> None:
        """Launch the sampling."""


class Runner(Protocol):
    """What computes steps, in the order in which they are launched."""

    profiling: bool

    def execute(self, plan: StepPlan) -> PendingStep:
        """Launch a step."""


BuildRunner = Callable[[EngineConfig, Stopwatch], tuple[Runner, EngineInfo]]
"""Makes the runner of an engine, and says what it settled on."""


@dataclass(slots=True)
class LaunchedStep:
    """A step that the device has, and the seconds that scheduling it took."""

    plan: StepPlan
    pending: PendingStep
    schedule_s: float
