"""Protocols of one's own: subclass `ServingEngine`, put the class on the allow-list, name it in the
table of models. What a plug-in needs comes from here, and none of it imports torch."""

from deployments.plugins.serving_engine import (
    EVENT_STREAM,
    JSON_LINES,
    Prompt,
    ServingEngine,
    StreamFormat,
)
from deployments.protocols.body import Body
from engine.errors import InvalidRequest
from engine.output_processor import TextDelta
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams

__all__ = [
    "EVENT_STREAM",
    "JSON_LINES",
    "Body",
    "InvalidRequest",
    "Prompt",
    "RequestOutput",
    "SamplingParams",
    "ServingEngine",
    "StreamFormat",
    "TextDelta",
]
