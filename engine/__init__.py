"""Trunkline's inference engine: tokens in, tokens out. Knows no Ray and no HTTP.

Names are imported on first use, so that the ingress can share the plain ones without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.errors import ConfigError, EngineDead, InvalidRequest, StepFailed
    from engine.inference_engine import InferenceEngine
    from engine.llm import LLM
    from engine.outputs import (
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        RequestMetrics,
        RequestOutput,
    )
    from engine.profile import StepRecord
    from engine.runner.memory_plan import MemoryPlan, plan_memory
    from engine.sampling_params import SamplingParams
    from engine.structured_outputs.params import StructuredOutputsParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "EngineDead",
    "InferenceEngine",
    "InvalidRequest",
    "MemoryPlan",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StepFailed",
    "StepRecord",
    "StructuredOutputsParams",
    "plan_memory",
]

_HOMES = {
    "LLM": "llm",
    "InferenceEngine": "inference_engine",
    "EngineConfig": "config",
    "SamplingParams": "sampling_params",
    "ConfigError": "errors",
    "EngineDead": "errors",
    "InvalidRequest": "errors",
    "StepFailed": "errors",
    "CompletionOutput": "outputs",
    "EmbeddingOutput": "outputs",
    "EmbeddingRequestOutput": "outputs",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "StepRecord": "profile",
    "MemoryPlan": "runner.memory_plan",
    "plan_memory": "runner.memory_plan",
    "StructuredOutputsParams": "structured_outputs.params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute '{name}'")
    return getattr(importlib.import_module(f"engine.{_HOMES[name]}"), name)
