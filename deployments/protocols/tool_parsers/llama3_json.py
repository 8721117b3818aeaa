"""The form of Llama 3.1 to 3.3: `{"name": …, "parameters": {…}}` and nothing around it."""

from __future__ import annotations

from deployments.protocols.json_scan import WHITESPACE
from deployments.protocols.tool_parsers.base import ToolCallParser


class Llama3JsonParser(ToolCallParser):
    """Takes objects at the start of the answer or behind `<|python_tag|>`; several may follow one
    another. Since an answer may also be other JSON, the function must be known."""

    opening = "<|python_tag|>"
    between = WHITESPACE + ";,"
    bare = True
    only_known = True
