import subprocess
import sys
import threading
import time

import pytest
import regex
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from engine.config import BUNDLED_MODEL
from engine.errors import InvalidRequest
from engine.gguf_header import read_gguf_header
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer
from tests.engine.tokenizer_cases import NUMBERS, TEXTS, sentencepiece_like, smollm2

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
@example("▁ one▁two")
def test_any_text_survives_the_round_trip(text):
    for control in "\x04\x06\x13\x14\x16\x1d":  # bytes that SmolLM2's vocabulary lacks
        text = text.replace(control, "")
    spaced = text.replace("▁", " ")  # SentencePiece's own sign for a space, to which it is equal
    for tokenizer, expected in ((smollm2(), text), (sentencepiece_like(), spaced)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


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


@pytest.mark.parametrize("decoder", [None, decoders.Metaspace(), decoders.ByteLevel()])
def test_added_tokens_are_text_under_every_decoder(decoder):
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "▁b": 1}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens([AddedToken("<é▁>", normalized=False)])
    tokenizer = Tokenizer(backend)
    assert "<é▁>" in tokenizer.decode([0, 2, 0])
