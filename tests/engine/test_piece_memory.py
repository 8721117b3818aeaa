"""Whatever stands in the memory, ids are those of encoding the whole text at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from benchmarks.serving.shape_tokenizer import build_tokenizer
from engine import piece_memory
from engine.errors import InvalidRequest
from engine.piece_memory import PieceMemory, find_dividers
from engine.tokenizer import Tokenizer
from tests.engine.tokenizer_cases import (
    bare_metaspace_like,
    metaspace_like,
    sentencepiece_like,
    smollm2,
)

ENDS = ["<s>", "</s>", "<s><s>", "<s"]
"""Of which some begin others."""


def spaced():
    """A space before each text, and normalized text in which tokens are found, too."""
    backend = build_tokenizer(1000)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.add_special_tokens(ENDS)
    backend.add_tokens([AddedToken("fi", normalized=True), AddedToken(" x", lstrip=True)])
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return Tokenizer(backend)


def words():
    """Words of a vocabulary in which some are named like special tokens."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "<s>": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(ENDS)
    return Tokenizer(backend)


KINDS = {
    "smollm2": smollm2(),
    "sentencepiece": sentencepiece_like(),
    "metaspace": metaspace_like(),
    "bare metaspace": bare_metaspace_like(),
    "spaced": spaced(),
    "words": words(),
}


def at_once(tokenizer, text):
    return tokenizer._backend.encode(text, add_special_tokens=False).ids


def texts_of(tokenizer):
    """Texts with many dividers, whole and cut, and what normalizing and dividing may trip over."""
    special = list(find_dividers(tokenizer._backend))
    cut = [text[:-1] for text in special] + [text[1:] for text in special]
    odd = [" ", "  ", "\n", "e", "\u0301", "ﬁ", "＜s＞", "▁", "Hello", " wor", "ld", "a", "b", "12"]  # noqa: RUF001
    part = st.sampled_from([*special, *special, *cut, *odd]) | st.text(max_size=3)
    return st.lists(part, max_size=12).map("".join).filter(is_unicode)


def is_unicode(text):
    return not regex.search(r"\p{Cs}", text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_ids_are_those_of_the_whole_text(kind, data):
    tokenizer = KINDS[kind]
    for text in data.draw(st.lists(texts_of(tokenizer), max_size=4)):
        assert tokenizer.encode_rendered(text) == at_once(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_dividers(kind):
    assert set(find_dividers(KINDS[kind]._backend)) >= {
        "<|im_start|>" if kind == "smollm2" else "<s>"
    }


def counting(tokenizer, **options):
    """A memory, and the texts that it encodes."""
    encoded = []

    def encode(text):
        encoded.append(text)
        return at_once(tokenizer, text)

    return PieceMemory(find_dividers(tokenizer._backend), encode, **options), encoded


def test_the_next_turn_encodes_what_is_new_alone():
    memory, encoded = counting(smollm2())
    turns = ["You are kind.", "Hello", "Hi there", "How are you?"]
    begin, roles = "", ["system", "user", "assistant", "user"]
    texts = [f"<|im_start|>{r}\n{t}<|im_end|>\n" for r, t in zip(roles, turns, strict=True)]
    end = "<|im_start|>assistant\n"
    for count in (2, 4, 4):
        text = begin + "".join(texts[:count]) + end
        assert memory.encode(text) == at_once(smollm2(), text)
    assert encoded == [
        texts[0] + texts[1] + end,
        (texts[2] + texts[3]).removesuffix("<|im_end|>\n"),
    ]


def test_memory_is_bounded_and_forgets_what_was_not_used_for_longest():
    memory, encoded = counting(smollm2(), max_bytes=4000)
    for number in range(200):
        memory.encode("<|im_start|>first")
        memory.encode(f"<|im_start|>number {number}")
        assert memory.num_bytes <= 4000
    assert encoded.count("<|im_start|>first") == 1
    memory.encode("<|im_start|>number 0")
    assert encoded.count("<|im_start|>number 0") == 2
    held = sum(piece_memory._size(*each) for each in memory._known.items())
    assert memory.num_bytes == held > 2000
    memory.encode("<|im_start|>" + "long " * 4000)
    assert memory.num_bytes <= 4000


def test_ids_of_dividers_that_come_of_something_else_are_not_taken_for_dividers():
    memory, encoded = counting(words())
    for _ in range(2):
        assert memory.encode("<s>＜s＞ a</s>b") == at_once(words(), "<s>＜s＞ a</s>b")  # noqa: RUF001
    assert len(encoded) == 2
    assert memory.num_bytes == 0


def test_many_pieces_are_encoded_as_a_whole(monkeypatch):
    monkeypatch.setattr(piece_memory, "MAX_PIECES", 3)
    memory, encoded = counting(smollm2())
    memory.encode("<|im_start|>" * 2)
    assert memory.num_bytes > 0
    memory.encode("<|im_start|>" * 3 + "a")
    assert encoded[-1] == "<|im_start|>" * 3 + "a"
    assert "<|im_start|>a" not in memory._known


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_take_in_their_surroundings_rule_it_out(option):
    backend = build_tokenizer(1000)
    backend.add_tokens([AddedToken("<s>", normalized=False)])
    assert find_dividers(backend) == {"<s>": 1000}
    backend.add_tokens([AddedToken("<t>", normalized=False, **{option: True})])
    assert find_dividers(backend) == {}
    tokenizer = Tokenizer(backend)
    for text in ("a <t> b", "a<t>b", "<s> <t><s>"):
        assert tokenizer.encode_rendered(text) == at_once(tokenizer, text)


def test_what_encodes_one_text_in_several_ways_rules_it_out():
    backend = build_tokenizer(1000)
    backend.add_tokens([AddedToken("<s>", normalized=False)])
    backend.model.dropout = 0.5
    assert find_dividers(backend) == {}
    backend.model.dropout = None
    backend.encode_special_tokens = True
    assert find_dividers(backend) == {}


def test_no_added_tokens_no_memory():
    tokenizer = Tokenizer(build_tokenizer(1000))
    assert tokenizer.encode_rendered("a") == at_once(tokenizer, "a")


def test_what_must_not_be_remembered_is_not():
    tokenizer = KINDS["spaced"]
    before = tokenizer._pieces.num_bytes
    tokenizer.encode_rendered("<s>a secret", remember=False)
    assert tokenizer._pieces.num_bytes == before


def test_unpaired_surrogates_are_refused():
    with pytest.raises(InvalidRequest, match="surrogate"):
        smollm2().encode_rendered("<|im_start|>a\ud800")


@given(st.lists(st.text("ab<|", min_size=1, max_size=4), min_size=1, max_size=6), st.text("ab<|"))
@settings(max_examples=100, deadline=None)
def test_the_longest_of_texts_is_found(texts, text):
    found = [m[0] for m in regex.finditer(piece_memory._longest_of(texts), text)]
    by_length = sorted(texts, key=len, reverse=True)
    assert found == regex.findall("|".join(map(regex.escape, by_length)), text)


def test_several_threads_may_use_it():
    memory, _ = counting(smollm2(), max_bytes=3000)
    texts = [f"<|im_start|>user {i}<|im_end|>\n<|im_start|>b {i % 7}" for i in range(60)]
    expected = [at_once(smollm2(), text) for text in texts]
    start = threading.Barrier(4)

    def encode_all(_):
        start.wait()
        return [memory.encode(text) for text in texts * 3]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(encode_all, range(4))) == [expected * 3] * 4
    assert 0 < memory.num_bytes <= 3000
