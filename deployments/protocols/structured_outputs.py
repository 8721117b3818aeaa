"""The fields by which clients ask for an output of some form: OpenAI's, vLLM's, and its older ones.

`with_form` is for what else asks for one, such as a tool that must be called.
"""

from __future__ import annotations

from typing import Any

import msgspec

from deployments.protocols.body import Body
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams
from engine.structured_outputs.params import KINDS, StructuredOutputsParams

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older fields, and what they are called within `structured_outputs`."""
_OPTIONS = frozenset((*KINDS, "disable_any_whitespace"))


class FormFields(Body):
    """At most one of these asks for a form; their contents are checked by `asked_form`."""

    response_format: dict[str, Any] | None = None
    """`{"type": "text"}`, `{"type": "json_object"}` or `{"type": "json_schema", "json_schema":
    {"name": ..., "schema": ...}}`."""
    structured_outputs: dict[str, Any] | None = None
    """One of `json`, `regex`, `choice`, `grammar`, `json_object`."""
    guided_json: dict[str, Any] | str | None = None
    """`structured_outputs.json`, by an older name; so are the next three."""
    guided_regex: str | None = None
    """`structured_outputs.regex`."""
    guided_choice: list[Any] | None = None
    """`structured_outputs.choice`."""
    guided_grammar: str | None = None
    """`structured_outputs.grammar`."""

    def asked_form(self) -> StructuredOutputsParams | None:
        """The form that the output must have, if any.

        Raises:
            InvalidRequest: more than one is asked for, or one is malformed; `param` names a field.
        """
        given = {
            name: value
            for name in ("response_format", "structured_outputs", *_GUIDED)
            if (value := getattr(self, name)) is not None
        }
        if given.get("response_format", {}).get("type") == "text":
            del given["response_format"]
        if len(given) > 1:
            first, second = list(given)[:2]
            raise InvalidRequest(
                f"{first} and {second} both ask for a form of the output; give one.", second
            )
        for name, value in given.items():
            form = _read(name, value)
            form.check()
            return form
        return None


def with_form(params: SamplingParams, form: StructuredOutputsParams) -> SamplingParams:
    """The same options for an output of a form.

    Args:
        params: of the request.
        form: what the output must be like; its `param` is the field that asks for it.

    Raises:
        InvalidRequest: the request asks for another form already, or this one cannot be kept.
    """
    form.check()
    if params.structured_outputs is not None:
        raise InvalidRequest(
            f"{form.param} and {params.structured_outputs.param} both ask for a form of the "
            "output; give one.",
            params.structured_outputs.param,
        )
    return msgspec.structs.replace(params, structured_outputs=form)


def _read(name: str, value: Any) -> StructuredOutputsParams:
    if name == "response_format":
        return _of_response_format(value)
    return _build(name, value if name == "structured_outputs" else {_GUIDED[name]: value})


def _of_response_format(value: dict[str, Any]) -> StructuredOutputsParams:
    name = "response_format"
    match value:
        case {"type": "json_object"}:
            return StructuredOutputsParams(json_object=True, param=name)
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return StructuredOutputsParams(json=schema, param=name)
        case {"type": "json_schema"}:
            raise InvalidRequest(
                'response_format needs {"type": "json_schema", "json_schema": {"name": "...", '
                '"schema": {...}}}.',
                name,
            )
    raise InvalidRequest("response_format.type must be text, json_object or json_schema.", name)


def _build(name: str, options: dict[str, Any]) -> StructuredOutputsParams:
    if unknown := sorted(key for key in options.keys() - _OPTIONS if options[key]):
        raise InvalidRequest(
            f"{name} does not support {', '.join(unknown)[:200]}; it takes one of "
            f"{', '.join(KINDS)}.",
            name,
        )
    known = {key: value for key, value in options.items() if key in _OPTIONS and value is not None}
    return StructuredOutputsParams(**known, param=name)
