"""The table of compatibility: every field that OpenAI's API or vLLM's server has, and what it does.

docs/compatibility.md is made from this, and `test_rows.py` tries every case.
"""

from __future__ import annotations

from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from tests.compatibility import vllm_fields
from tests.compatibility.chat import CHAT_ROWS
from tests.compatibility.completions import COMPLETION_ROWS
from tests.compatibility.embeddings import EMBEDDINGS_ROWS
from tests.compatibility.responses import RESPONSES_ROWS
from tests.compatibility.rows import Table
from tests.compatibility.tokens import DETOKENIZE_ROWS, TOKENIZE_ROWS


def _fields(kind: type) -> frozenset[str]:
    """Of a request of the `openai` package, whose two kinds differ in `stream` alone."""
    return frozenset(kind.__annotations__)


MESSAGES = [{"role": "user", "content": "hi"}]
TABLES = (
    Table(
        "/v1/chat/completions",
        {"model": "m", "messages": MESSAGES, "max_tokens": 4, "temperature": 0},
        _fields(chat_create_params.CompletionCreateParamsBase) | {"stream"},
        vllm_fields.CHAT,
        CHAT_ROWS,
    ),
    Table(
        "/v1/completions",
        {"model": "m", "prompt": "ab ab", "max_tokens": 4, "temperature": 0},
        _fields(completion_create_params.CompletionCreateParamsBase) | {"stream"},
        vllm_fields.COMPLETION,
        COMPLETION_ROWS,
    ),
    Table(
        "/v1/responses",
        {"model": "m", "input": "hi", "max_output_tokens": 4, "temperature": 0},
        _fields(response_create_params.ResponseCreateParamsBase) | {"stream"},
        vllm_fields.RESPONSES,
        RESPONSES_ROWS,
    ),
    Table(
        "/v1/embeddings",
        {"model": "m", "input": "ab ab"},
        _fields(embedding_create_params.EmbeddingCreateParams),
        vllm_fields.EMBEDDINGS,
        EMBEDDINGS_ROWS,
    ),
    Table(
        "/tokenize",
        {"model": "m", "prompt": "ab ab"},
        frozenset(),
        vllm_fields.TOKENIZE,
        TOKENIZE_ROWS,
    ),
    Table(
        "/detokenize",
        {"model": "m", "tokens": [70, 71]},
        frozenset(),
        vllm_fields.DETOKENIZE,
        DETOKENIZE_ROWS,
    ),
)
