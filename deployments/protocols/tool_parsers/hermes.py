"""The form of Hermes 2 Pro, Qwen2.5 and Qwen3: `<tool_call>{"name": …}</tool_call>`."""

from __future__ import annotations

from deployments.protocols.json_scan import WHITESPACE
from deployments.protocols.tool_parsers.base import ToolCallParser


class HermesParser(ToolCallParser):
    """Takes any name between the marks, which no other text has, so that a client can tell a model
    that there is no such function."""

    opening = "<tool_call>"
    closing = "</tool_call>"
    between = WHITESPACE + "}"  # small models close one brace too many
