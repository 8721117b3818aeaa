import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from engine import detokenizer
from engine.config import BUNDLED_MODEL
from engine.errors import ConfigError, InvalidRequest
from engine.gguf_header import read_gguf_header
from engine.gguf_tokenizer import build_gguf_tokenizer
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer, has_tokenizer
from tests.engine.test_model_config import LLAMA
from tests.engine.tokenizer_cases import TEXTS, sentencepiece_like, smollm2

SOURCE_CODE = Path(detokenizer.__file__).read_text()
NUMBERS = ["0123456789", "In 2024, 3.14159 and 1,000,000", "a1b22c333", "١٢٣ ²"]
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def bpe_by_hand(metadata, text: str) -> list[int]:
    """SmolLM2's tokenization from first principles: digits apart, then GPT-2's words and merges."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
    pieces = [p for p in regex.split(r"(\p{N})", text) if p]
    out = []
    for word in [w for piece in pieces for w in regex.findall(GPT2_SPLIT, piece)]:
        parts = [alphabet[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(tuple(parts[i : i + 2]), 1e9))
            if tuple(parts[best : best + 2]) not in ranks:
                break
            parts[best : best + 2] = ["".join(parts[best : best + 2])]
        out += [ids[part] for part in parts]
    return out


@pytest.fixture(scope="module")
def metadata():
    return read_gguf_header(resolve_model(BUNDLED_MODEL).path).metadata


def test_smollm2_tokenization_from_first_principles(metadata):
    for text in TEXTS + NUMBERS:
        assert smollm2().encode(text) == bpe_by_hand(metadata, text), text


def test_smollm2_digits_are_tokens_of_their_own():
    digits = smollm2().encode("0123456789")
    assert digits == list(range(digits[0], digits[0] + 10))
    assert smollm2().encode("42") == [digits[4], digits[2]]


def test_smollm2_special_tokens():
    tokenizer = smollm2()
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, *tokenizer.encode("a"), 2]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.vocab_size == 49152
    assert tokenizer.special_ids == frozenset(range(17))


def test_agrees_with_transformers_but_for_digits():
    import transformers

    path = resolve_model(BUNDLED_MODEL).path
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = smollm2()
    for text in [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello "}]
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ):
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.apply_chat_template(messages, **options) == expected


def test_imports_no_torch():
    code = (
        "import sys; from engine.tokenizer import Tokenizer; import engine.output_processor, "
        "engine.inputs; from engine.model_source import resolve_model; "
        f"t = Tokenizer.load(resolve_model('{BUNDLED_MODEL}')); "
        "t.encode_chat([{'role': 'user', 'content': 'Hi'}]); "
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x3FFFF)))
def test_any_text_survives_the_round_trip(text):
    for control in "\x04\x06\x13\x14\x16\x1d":  # bytes that SmolLM2's vocabulary lacks
        text = text.replace(control, "")
    for tokenizer in (smollm2(), sentencepiece_like()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 49_151), max_size=30))
@settings(max_examples=200, deadline=None)
def test_byte_level_decoding_equals_the_library_s(ids):
    tokenizer = smollm2()
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(259, 267), max_size=12))
@settings(deadline=None)
def test_sentencepiece_decoding_equals_the_library_s(ids):
    tokenizer = sentencepiece_like()
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=True)


def test_unknown_ids_stand_for_nothing():
    assert smollm2().decode([19556, 10**6, -1, 2**40]) == smollm2().decode([19556])


def test_token_text():
    tokenizer = smollm2()
    world = tokenizer.encode(" world")
    assert [tokenizer.token_text(i) for i in world] == [" world"]
    assert tokenizer.token_text(2) == "<|im_end|>"
    part = tokenizer.encode("😀")[0]
    assert tokenizer.token_text(part).endswith("\ufffd")


def test_encoding_lets_other_threads_run():
    """Python switches threads by itself only when asked to; here whoever waits is not that patient,
    so that the other thread counts during `encode` only if this lets go of the interpreter."""
    interval, count, ended = sys.getswitchinterval(), [0], threading.Event()

    def work() -> int:
        before = count[0]
        smollm2().encode("some words " * 20_000)
        return count[0] - before

    def run(results: list[int]) -> None:
        results.append(work())
        ended.set()

    results: list[int] = []
    smollm2()
    sys.setswitchinterval(100)
    try:
        thread = threading.Thread(target=run, args=(results,))
        thread.start()
        while not ended.is_set():
            count[0] += 1
            time.sleep(0)  # lets go
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert results[0] > 0


def test_unpaired_surrogates_are_refused():
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        smollm2().encode("a\ud800")
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest) as caught:
        smollm2().encode_chat([{"role": "user", "content": "\udc00"}])
    assert caught.value.param == "messages"


# Chat templates


def render(template, messages=({"role": "user", "content": "Hi"},), **options):
    tokenizer = Tokenizer(
        tokenizers.Tokenizer(models.BPE()),
        chat_template=template,
        special_tokens={"bos_token": "<s>"},
    )
    return tokenizer.apply_chat_template(list(messages), **options)


def test_bundled_chat_template():
    ids = smollm2().encode_chat([{"role": "user", "content": "Hi"}])
    text = smollm2().decode(ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(1) == 3


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>Hi"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi"}'),
        ("{{ tools | tojson(indent=1) }}", '[\n {\n  "a": "<é>"\n }\n]'),
        ("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ extra }}{{ documents is none }}", "7True"),
    ],
)
def test_template_environment(template, expected):
    assert render(template, tools=[{"a": "<é>"}], extra=7) == expected


def test_template_of_the_request_comes_first():
    assert render("a", chat_template="b") == "b"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert render("{{ messages[0].content }}", messages) == "a\nb"


@pytest.mark.parametrize("template", ["[{{ LAST }}]", "[{{ LAST | trim }}]"])
def test_continue_final_message_ends_where_it_ends(template):
    template = template.replace("LAST", "messages[-1].content")
    messages = [{"role": "assistant", "content": "Once "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    kept = "Once" if "trim" in template else "Once "
    assert render(template, messages, **options) == "[" + kept
    assert messages[0]["content"] == "Once "


def test_an_answer_without_content_is_an_empty_one():
    assert render("[{{ messages[0].content }}]", [{"role": "assistant"}]) == "[]"


@pytest.mark.parametrize(
    ("template", "messages", "options", "param", "remedy"),
    [
        (None, None, {}, "chat_template", "pass chat_template"),
        ("{% if %}", None, {}, "chat_template", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", None, {}, "messages", "must alternate"),
        ("{{ messages.__class__.__mro__ }}", None, {}, "messages", "unsafe"),
        ("{{ messages.append(1) }}", None, {}, "messages", "unsafe"),
        (
            "{{ 'a' + messages[0].content }}",
            [{"role": "assistant", "content": None, "tool_calls": [{}]}],
            {},
            "messages",
            "concatenate",
        ),
        ("x", [{"role": "user", "content": None}], {}, "messages", r"messages\[0\] lacks"),
        ("x", [{"role": "user"}], {}, "messages", r"messages\[0\] lacks its content"),
        ("x", [], {}, "messages", "at least one"),
        ("x", ["Hi"], {}, "messages", "role"),
        ("x", [{"content": "Hi"}], {}, "messages", "role"),
        ("x", [{"role": "user", "content": 3}], {}, "messages", "content"),
        (
            "x",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            {},
            "messages",
            "text only",
        ),
        ("x", None, {"continue_final_message": True}, "continue_final_message", "excludes"),
        (
            "x",
            None,
            {"continue_final_message": True, "add_generation_prompt": False},
            "continue_final_message",
            "leaves out",
        ),
    ],
)
def test_bad_chats_are_the_client_s_error(template, messages, options, param, remedy):
    messages = [{"role": "user", "content": "Hi"}] if messages is None else messages
    with pytest.raises(InvalidRequest, match=remedy) as caught:
        render(template, messages, **options)
    assert caught.value.param == param


# GGUF vocabularies


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


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sp")
    (folder / "text.txt").write_text("\n".join([*TEXTS, *NUMBERS, SOURCE_CODE]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")), folder


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


# Directories


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


@pytest.mark.parametrize("decoder", [None, decoders.Metaspace(), decoders.ByteLevel()])
def test_added_tokens_are_text_under_every_decoder(decoder):
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "▁b": 1}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens([AddedToken("<é▁>", normalized=False)])
    tokenizer = Tokenizer(backend)
    assert "<é▁>" in tokenizer.decode([0, 2, 0])
