"""Text to token ids and back, and chat messages to a prompt. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from engine.chat_template import ChatTemplate
from engine.config_keys import read_json_object
from engine.errors import InvalidRequest
from engine.gguf_header import read_gguf_header
from engine.gguf_tokenizer import build_gguf_tokenizer
from engine.model_config import config_from_gguf, read_model_config
from engine.model_source import ModelSource
from engine.piece_memory import PieceMemory, find_dividers
from engine.token_bytes import SkippingTokenBytes, TokenBytes
from engine.tokenizer_files import (
    SLOW_FILES,
    add_ends,
    load_backend,
    read_chat_template,
    read_special_tokens,
)

_ENDS = ("bos", "eos", "unknown", "padding", "separator")
"""Special tokens that GGUF metadata names."""


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        backend: encodes and names tokens.
        eos_token_ids: tokens that end a sequence.
        chat_template: Jinja source, or None when the model has none.
        special_tokens: name → text of the tokens that chat templates refer to, such as `bos_token`.

    Attributes:
        vocab_size: token ids that stand for something lie below this.
        special_ids: ids that `skip_special_tokens` leaves out.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()  # tokenizer.json may carry the settings of a training run
        backend.no_padding()
        self._backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = self._id_of("bos_token")
        self.vocab_size: int = 1 + max(
            backend.get_vocab(with_added_tokens=True).values(), default=-1
        )
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._all_bytes = TokenBytes(backend)
        self._text_bytes = SkippingTokenBytes(self._all_bytes, self.special_ids)
        dividers = find_dividers(backend)
        self._pieces = PieceMemory(dividers, self._encode_bare) if dividers else None

    @classmethod
    def load(cls, source: ModelSource) -> Tokenizer:
        """Load the tokenizer of a model.

        Raises:
            ConfigError: the model has none, or one of a kind that is not supported.
        """
        if source.kind == "gguf":
            return _from_gguf(source.path)
        return _from_directory(source)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens` puts what the model wants around it.

        Raises:
            InvalidRequest: the text is not valid Unicode.
        """
        with _refusing_surrogates("prompt"):
            return self._encode(text, add_special_tokens)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of `apply_chat_template`."""
        return self.encode_rendered(self.apply_chat_template(messages, **options))

    def encode_rendered(self, text: str, remember: bool = True) -> list[int]:
        """Token ids of what `apply_chat_template` gave, which has all special tokens in it.

        Args:
            text: of the chat.
            remember: encode only what no earlier chat had, and keep it in memory.

        Raises:
            InvalidRequest: the text is not valid Unicode.
        """
        with _refusing_surrogates("messages"):
            if remember and self._pieces is not None:
                return self._pieces.encode(text)
            return self._encode_bare(text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        data = b"".join(map(self.token_bytes(skip_special_tokens).__getitem__, ids))
        if self.strips_space:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        """Text of one token, special or not; part of a character shows as U+FFFD."""
        return self._all_bytes[token_id].decode(errors="replace")

    def spelling(self, token_id: int) -> str:
        """A token as the vocabulary spells it, such as `Ġthe`; empty for ids that it lacks."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """Token id → its bytes; empty for special tokens when these are skipped."""
        return self._text_bytes if skip_special_tokens else self._all_bytes

    @property
    def strips_space(self) -> bool:
        """Whether one space at the very start of a text is left out."""
        return self._all_bytes.strips_space

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render messages to a prompt.

        Args:
            messages: see `ChatTemplate.render`, as for the next two.
            chat_template: Jinja source to use in place of the model's own.
            add_generation_prompt: end with the start of the assistant's turn.
            continue_final_message: end within the last message.
            tools: JSON schemas of functions, for templates that know of tools.
            variables: whatever else the template reads, such as `enable_thinking`.

        Raises:
            InvalidRequest: there is no template, it is not valid, or it refuses the messages.
        """
        template = ChatTemplate(chat_template) if chat_template else self._own_template
        given = {**self.special_tokens, "documents": None, **variables, "tools": tools}
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=given,
        )

    @cached_property
    def _own_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template; add chat_template.jinja to its directory, pass "
                "chat_template where that is allowed, or complete a prompt instead.",
                "chat_template",
            )
        return ChatTemplate(self.chat_template)

    def _encode_bare(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the library's ways to encode, the ones for batches let other Python threads run
        # meanwhile, and this one leaves out the offsets, which are a third of the work.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        token_id: int | None = self._backend.token_to_id(text) if text is not None else None
        return token_id


@contextmanager
def _refusing_surrogates(param: str) -> Iterator[None]:
    """JSON can spell half of a surrogate pair; UTF-8, and so the library, cannot."""
    try:
        yield
    except TypeError as error:
        raise InvalidRequest("the text holds an unpaired surrogate; remove it.", param) from error


def has_tokenizer(source: ModelSource) -> bool:
    """Whether a model comes with a tokenizer; a directory for dummy weights may lack one."""
    if source.kind == "gguf":
        return "tokenizer.ggml.model" in read_gguf_header(source.path).metadata
    return any((source.path / name).is_file() for name in ("tokenizer.json", *SLOW_FILES))


def _from_gguf(path: Path) -> Tokenizer:
    header = read_gguf_header(path)
    metadata = header.metadata
    backend = build_gguf_tokenizer(metadata)
    names = {"unknown": "unk", "padding": "pad", "separator": "sep"}
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        f"{names.get(end, end)}_token": tokens[index]
        for end in _ENDS
        if (index := metadata.get(f"tokenizer.ggml.{end}_token_id")) is not None
    }
    return Tokenizer(
        backend,
        eos_token_ids=config_from_gguf(header, path).eos_token_ids,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens=special,
    )


def _from_directory(source: ModelSource) -> Tokenizer:
    folder = source.path
    path = folder / "tokenizer_config.json"
    options = read_json_object(path) if path.is_file() else {}
    backend = load_backend(folder)
    special = read_special_tokens(options)
    add_ends(backend, options, special)
    return Tokenizer(
        backend,
        eos_token_ids=read_model_config(source).eos_token_ids,
        chat_template=read_chat_template(folder, options),
        special_tokens=special,
    )
