"""Builds a tokenizer from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from engine.errors import ConfigError
from engine.token_bytes import SPACE_MARK

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Values of `tokenizer.ggml.token_type`."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen 2 and Llama 3 split a text before merging; `%s` is how many digits stay together."""


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that `tokenizer.ggml.*` describes.

    Args:
        metadata: of a GGUF file.

    Raises:
        ConfigError: the kind of tokenizer is not supported, or a key is missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise ConfigError(
            f"tokenizer.ggml.model is {kind!r}; supported are {', '.join(_BUILDERS)}."
        )
    try:
        tokenizer = _BUILDERS[kind](metadata)
        _add_tokens(tokenizer, metadata)
        _add_ends(tokenizer, metadata)
    except KeyError as error:
        raise ConfigError(f"the GGUF file has no {error.args[0]}, which a tokenizer needs.") from (
            error
        )
    return tokenizer


def _byte_level_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ConfigError(
            f"tokenizer.ggml.pre is {pre!r}; supported are {', '.join(_PRE_TOKENIZERS)}. "
            "Use the model's Hugging Face directory instead."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE merges the pair whose result scores highest; a list of merges in the
    order of their results' scores does the same."""
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    vocabulary = _vocabulary(metadata)
    merges = _merges_by_score(vocabulary, metadata["tokenizer.ggml.scores"])
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    bpe = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(SPACE_MARK))
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(
    vocabulary: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    ranked = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Declare the tokens that are found in a text before it is split."""
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Put the begin- and end-of-sequence tokens around a text, where the model expects them."""
    by_default = metadata["tokenizer.ggml.model"] == "llama" or (
        metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    parts, specials = ["$A"], []
    for end, default in (("bos", by_default), ("eos", False)):
        if metadata.get(f"tokenizer.ggml.add_{end}_token", default):
            index = metadata[f"tokenizer.ggml.{end}_token_id"]
            token = metadata["tokenizer.ggml.tokens"][index]
            parts.insert(0 if end == "bos" else len(parts), token)
            specials.append((token, index))
    if specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=specials
        )


_BUILDERS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
"""`tokenizer.ggml.model` → builder."""

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_PRE_TOKENIZERS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "default": [_WORDS],
    "gpt-2": [_WORDS],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _WORDS],
    "qwen2": [pre_tokenizers.Split(Regex(_SPLIT % ""), "isolated"), _BYTES],
    "llama-bpe": [pre_tokenizers.Split(Regex(_SPLIT % "{1,3}"), "isolated"), _BYTES],
}
"""`tokenizer.ggml.pre` → steps that split a text before merging."""
