import pytest

from engine.errors import ConfigError
from engine.gguf_tokenizer import build_gguf_tokenizer
from engine.tokenizer import Tokenizer
from tests.engine.tokenizer_cases import NUMBERS, SOURCE_CODE, TEXTS


def gguf_metadata(**keys):
    base = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "<tool>", "Ġ"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3, 4, 1],
        "tokenizer.ggml.merges": ["a b"],
    }
    return base | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def test_control_and_user_defined_tokens():
    tokenizer = Tokenizer(build_gguf_tokenizer(gguf_metadata()))
    ids = tokenizer.encode("ab<s>a<tool>b")
    assert ids == [2, 3, 0, 4, 1]
    assert tokenizer.special_ids == {3}
    assert tokenizer.decode(ids) == "aba<tool>b"


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({}, [0]),
        ({"add_bos_token": True, "bos_token_id": 3}, [3, 0]),
        ({"add_bos_token": False, "bos_token_id": 3, "pre": "llama-bpe"}, [0]),
        ({"bos_token_id": 3, "pre": "llama-bpe"}, [3, 0]),
        ({"add_eos_token": True, "eos_token_id": 3}, [0, 3]),
        (
            {"add_bos_token": True, "bos_token_id": 3, "add_eos_token": True, "eos_token_id": 4},
            None,
        ),
    ],
)
def test_ends_of_a_text(keys, ids):
    tokenizer = Tokenizer(build_gguf_tokenizer(gguf_metadata(**keys)))
    assert tokenizer.encode("a") == (ids or [3, 0, 4])
    assert tokenizer.encode("a", add_special_tokens=False) == [0]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["It", "'s", " 2024", "!!", "\n\n", " x"]),
        ("gpt-2", ["It", "'s", " 2024", "!!", "\n\n", " x"]),
        ("smollm", ["It", "'s", " ", "2", "0", "2", "4", "!!", "\n\n", " x"]),
        ("qwen2", ["It", "'s", " ", "2", "0", "2", "4", "!!\n\n", " x"]),
        ("llama-bpe", ["It", "'s", " ", "202", "4", "!!\n\n", " x"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(pre, pieces):
    split = build_gguf_tokenizer(gguf_metadata(pre=pre, bos_token_id=3)).pre_tokenizer
    got = [piece for piece, _ in split.pre_tokenize_str("It's 2024!!\n\n x")]
    shown = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in got]
    assert shown == pieces


@pytest.mark.parametrize(("pre", "ids"), [("llama-bpe", [2]), ("qwen2", [0, 1])])
def test_llama_3_takes_words_of_the_vocabulary_whole(pre, ids):
    metadata = gguf_metadata(pre=pre, bos_token_id=3, add_bos_token=False, merges=[])
    assert build_gguf_tokenizer(metadata).encode("ab").ids == ids


@pytest.mark.parametrize(("pre", "ids"), [("qwen2", [0, 1]), ("gpt-2", [2])])
def test_qwen_2_composes_characters(pre, ids):
    tokens = ["\u00c3", "\u00a9", "e"]  # the bytes of U+00E9, and e before U+0301
    metadata = gguf_metadata(pre=pre, tokens=tokens, token_type=[1, 1, 1], merges=[])
    assert build_gguf_tokenizer(metadata).encode("e\u0301").ids == ids


def test_unknown_characters_of_a_vocabulary_without_bytes_are_one_token():
    flags = {"add_bos_token": False, "add_space_prefix": False, "unknown_token_id": 3}
    metadata = gguf_metadata(model="llama", scores=[0.0] * 6, **flags)
    assert build_gguf_tokenizer(metadata).encode("a日本b").ids == [0, 3, 1]


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (gguf_metadata(pre="deepseek-llm"), "tokenizer.ggml.pre is 'deepseek-llm'"),
        (gguf_metadata(model="bert"), "tokenizer.ggml.model is 'bert'"),
        ({}, "tokenizer.ggml.model is None"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.tokens"),
    ],
)
def test_unsupported_vocabularies_are_named(metadata, named):
    with pytest.raises(ConfigError, match=named):
        build_gguf_tokenizer(metadata)


def test_sentencepiece_vocabulary_encodes_as_sentencepiece_does(sentencepiece_model):
    model, _ = sentencepiece_model
    kinds = {"is_unknown": 2, "is_control": 3, "is_byte": 6}
    size = model.vocab_size()
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": [
            next((kind for name, kind in kinds.items() if getattr(model, name)(i)), 1)
            for i in range(size)
        ],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }
    tokenizer = Tokenizer(build_gguf_tokenizer(metadata))
    for text in [*TEXTS, *NUMBERS, SOURCE_CODE]:
        assert tokenizer.encode(text) == [model.bos_id(), *model.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
