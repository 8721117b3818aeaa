"""How models write calls of functions: one parser for each form."""

from __future__ import annotations

from deployments.protocols.tool_parsers.base import ToolCallParser
from deployments.protocols.tool_parsers.hermes import HermesParser
from deployments.protocols.tool_parsers.llama3_json import Llama3JsonParser

TOOL_CALL_PARSERS: dict[str, type[ToolCallParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
}
"""By the names that vLLM's `--tool-call-parser` has for them."""


def guess_parser(chat_template: str | None) -> str | None:
    """Name of the parser for the form that a chat template teaches, or None when none is known."""
    template = chat_template or ""
    if "<tool_call>" in template and "<function=" not in template:
        return "hermes"
    if "<|python_tag|>" in template or '"parameters": dictionary of argument name' in template:
        return "llama3_json"
    return None
