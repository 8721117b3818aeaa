"""Which endpoints of OpenAI's API and vLLM's server are there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoint:
    """An endpoint of theirs.

    `resource` is the attribute of `openai.OpenAI` that calls it.
    """

    method: str
    path: str
    here: bool
    resource: str = ""
    note: str = ""

    @property
    def of(self) -> str:
        return "OpenAI" if self.resource else "vLLM"

    @property
    def verdict(self) -> str:
        return "yes" if self.here else "no: 404"


def _openai(resource: str, method: str, path: str, here: bool = False, note: str = "") -> Endpoint:
    return Endpoint(method, path, here, resource, note)


def _vllm(method: str, path: str, here: bool = False, note: str = "") -> Endpoint:
    return Endpoint(method, path, here, note=note)


STATELESS = "Nothing is kept."
ENDPOINTS = (
    _openai("chat", "POST", "/v1/chat/completions", here=True),
    _openai("chat", "GET", "/v1/chat/completions/{id}", note=STATELESS),
    _openai("completions", "POST", "/v1/completions", here=True),
    _openai("responses", "POST", "/v1/responses", here=True, note="For text."),
    _openai("responses", "GET", "/v1/responses/{id}", note=STATELESS),
    _openai("responses", "POST", "/v1/responses/input_tokens", note="`/tokenize` counts tokens."),
    _openai("responses", "POST", "/v1/responses/compact"),
    _openai("embeddings", "POST", "/v1/embeddings", here=True),
    _openai("models", "GET", "/v1/models", here=True),
    _openai("models", "GET", "/v1/models/{id}", here=True),
    _openai("batches", "POST", "/v1/batches", note="`trunkline batch` runs the same files."),
    _openai("files", "POST", "/v1/files", note=STATELESS),
    _openai("uploads", "POST", "/v1/uploads", note=STATELESS),
    _openai("moderations", "POST", "/v1/moderations"),
    _openai("audio", "POST", "/v1/audio/transcriptions", note="Text only."),
    _openai("images", "POST", "/v1/images/generations", note="Text only."),
    _openai("videos", "POST", "/v1/videos", note="Text only."),
    _openai("realtime", "POST", "/v1/realtime/client_secrets", note="Text only."),
    _openai("fine_tuning", "POST", "/v1/fine_tuning/jobs"),
    _openai("vector_stores", "POST", "/v1/vector_stores", note=STATELESS),
    _openai("conversations", "POST", "/v1/conversations", note=STATELESS),
    _openai("containers", "POST", "/v1/containers"),
    _openai("admin", "GET", "/v1/organization/admin_api_keys"),
    _openai("beta", "POST", "/v1/assistants", note=STATELESS),
    _openai("evals", "POST", "/v1/evals"),
    _openai("skills", "POST", "/v1/skills"),
    _openai("live", "POST", "/v1/live/sessions", note="Text only."),
    _openai("decisions", "POST", "/v1/decisions"),
    _openai("safety", "GET", "/v1/safety/cases/{id}"),
    _openai("webhooks", "POST", "/v1/webhook_endpoints"),
    _openai("content_provenance_checks", "POST", "/v1/content_provenance_checks"),
    _vllm("POST", "/tokenize", here=True),
    _vllm("POST", "/detokenize", here=True),
    _vllm("GET", "/tokenizer_info"),
    _vllm("GET", "/health", here=True, note="Says more; see serving.md."),
    _vllm("GET", "/ping", here=True),
    _vllm("GET", "/version", here=True),
    _vllm("GET", "/metrics", here=True, note="vLLM's suffixes under `trunkline_`."),
    _vllm("GET", "/load", note="`/health` and `/metrics` tell it."),
    _vllm("POST", "/pooling"),
    _vllm("POST", "/classify"),
    _vllm("POST", "/score"),
    _vllm("POST", "/rerank"),
    _vllm("POST", "/invocations"),
    _vllm("POST", "/v1/messages"),
    _vllm("POST", "/v1/load_lora_adapter"),
    _vllm("POST", "/v1/completions/render"),
)
