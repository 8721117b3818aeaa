"""The form that a model is held to when it must call: `[{"name": …, "arguments": {…}}, …]`."""

from __future__ import annotations

from deployments.protocols.json_scan import WHITESPACE
from deployments.protocols.tool_parsers.base import ToolCallParser


class ListedCallsParser(ToolCallParser):
    """Takes every object in the list, which `ToolUse.schema` describes."""

    opening = "["
    between = WHITESPACE + ",]"
    bare = True
