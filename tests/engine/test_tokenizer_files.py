import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from engine.errors import ConfigError
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer, has_tokenizer
from tests.engine.test_model_config import LLAMA


def save_directory(folder, backend, **tokenizer_config):
    (folder / "config.json").write_text(json.dumps(LLAMA))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return resolve_model(str(folder))


def words_backend():
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "Ġ": 3}, merges=[("a", "b")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def test_directory(tmp_path):
    backend = words_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    source = save_directory(
        tmp_path, backend, eos_token={"content": "</s>"}, bos_token="<s>", chat_template="T"
    )
    tokenizer = Tokenizer.load(source)
    assert tokenizer.encode("ab a b") == [2, 3, 0, 3, 1]  # neither truncated nor padded
    assert tokenizer.eos_token_ids == (2, 5)  # config.json's, and the tokenizer's own
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}]) == "T"
    assert has_tokenizer(source)


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, [4, 0]),
        ({"add_bos_token": True, "add_eos_token": True}, [4, 0, 5]),
        ({"add_bos_token": False}, [0]),
    ],
)
def test_ends_that_the_configuration_asks_for(options, ids, tmp_path):
    backend = words_backend()
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 4)]
    )
    source = save_directory(tmp_path, backend, bos_token="<s>", eos_token="</s>", **options)
    assert Tokenizer.load(source).encode("a") == ids


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "new"),
        ("chat_template.json", '{"chat_template": "new"}'),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": "x"},'
            '{"name": "default", "template": "new"}]}',
        ),
    ],
)
def test_places_of_chat_templates(name, content, tmp_path):
    source = save_directory(tmp_path, words_backend(), chat_template="old")
    (tmp_path / name).write_text(content)
    assert Tokenizer.load(source).chat_template == "new"


def test_older_tokenizer_files_go_through_transformers(sentencepiece_model, tmp_path):
    model, folder = sentencepiece_model
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 600}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = Tokenizer.load(resolve_model(str(tmp_path)))
    text = "The capital of France"
    assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text)


def test_directory_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    source = resolve_model(str(tmp_path))
    assert not has_tokenizer(source)
    with pytest.raises(ConfigError, match=r"no tokenizer: none of tokenizer\.json"):
        Tokenizer.load(source)


def test_broken_tokenizer_file_is_named(tmp_path):
    source = save_directory(tmp_path, words_backend())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a usable tokenizer"):
        Tokenizer.load(source)


def test_unknown_decoder_is_named(tmp_path):
    backend = words_backend()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="WordPiece"):
        Tokenizer.load(save_directory(tmp_path, backend))
