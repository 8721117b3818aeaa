"""A tiny random model with a byte-level tokenizer, whose tokens are bytes and some longer texts."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.engine.conftest import TINY_LLAMA

EOS = 2
WORDS = ('{"', '":', "true", "false", "null", '"}', ", ", "ab", "12", "é")
"""Tokens of several bytes, so that tokens span what a grammar tells apart."""


def write_byte_model(path: Path) -> str:
    """Write config.json and tokenizer.json; 300 logits, of which the last ones are padding."""
    path.mkdir(parents=True, exist_ok=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = ["<pad>", "<s>", "</s>", *alphabet], []
    for word in WORDS:
        spelled = byte_level.pre_tokenize_str(word)[0][0]
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in tokens:
                tokens.append(spelled[:end])
                merges.append((spelled[: end - 1], spelled[end - 1]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens) < TINY_LLAMA["vocab_size"]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return str(path)
