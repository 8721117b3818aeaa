"""The synthetic tokenizer of shapes."""

import json
import random

import pytest

from benchmarks.models import SHAPES
from benchmarks.serving.conversations import WORDS, Mix
from benchmarks.serving.shape_tokenizer import build_tokenizer, write_model
from engine import LLM
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer

SIZE = 8000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder of a small vocabulary, as the engine reads it."""
    shape = tmp_path_factory.mktemp("shape")
    config = json.loads((SHAPES / "qwen2.5-7b" / "config.json").read_text())
    config |= {"vocab_size": SIZE, "bos_token_id": 7000, "eos_token_id": 7001}
    config |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (shape / "config.json").write_text(json.dumps(config))
    return write_model(shape, tmp_path_factory.mktemp("model") / "made")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(resolve_model(str(folder)))


def test_it_has_exactly_the_ids_of_the_shape(tokenizer):
    assert tokenizer.vocab_size == SIZE
    assert tokenizer.special_ids == {7000, 7001}
    assert tokenizer.eos_token_ids == (7001,)
    texts = tokenizer.token_bytes(skip_special_tokens=False)
    assert len({texts[i] for i in range(SIZE)} - {b""}) == SIZE


def test_it_is_the_same_every_time():
    assert build_tokenizer(SIZE).to_str() == build_tokenizer(SIZE).to_str()


def test_every_id_but_the_special_ones_decodes_to_about_four_characters():
    backend = build_tokenizer(20_000, {"<|eos_token|>": 0})
    sizes = [len(backend.decode([i])) for i in range(1, 20_000)]
    assert min(sizes) >= 1
    assert 3.5 < sum(sizes) / len(sizes) < 5


def test_some_ids_hold_several_bytes_and_some_are_cut(tokenizer):
    texts = [tokenizer.token_bytes(skip_special_tokens=True)[i] for i in range(SIZE)]
    whole = [text for text in texts if len(text) == 3 and text[0] >= 0xE4]
    cut = [text for text in texts if len(text) == 2 and text[0] >= 0xE4]
    assert len(whole) > 400
    assert len(cut) > 10
    assert all(len(text.decode()) == 1 for text in whole)


def test_the_words_of_prompts_are_one_token_each(tokenizer):
    conversation = next(Mix((160, 480), (1, 1)).draw(3))
    text = conversation.turns[0].text
    ids = tokenizer.encode(text)
    assert len(ids) == text.count(" ")
    assert {tokenizer.token_text(i)[1:] for i in ids} <= set(WORDS)


@pytest.mark.parametrize("text", ["", " time", "Grüße, 漢字 \n\n x == 1\t", "  two  spaces "])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_any_kind_decode_without_an_error(tokenizer):
    rng = random.Random(0)
    assert len(tokenizer.decode([rng.randrange(SIZE) for _ in range(2000)])) > 4000


def test_a_vocabulary_without_room_for_bytes_and_words_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        build_tokenizer(300)
    with pytest.raises(ValueError, match="special ids"):
        build_tokenizer(SIZE, {"<|eos_token|>": SIZE})


def test_an_engine_with_dummy_weights_takes_text_and_gives_text(folder):
    llm = LLM(
        model=str(folder), load_format="dummy", device="cpu", kv_cache_memory_bytes=10_000_000
    )
    output = llm.generate(" time year people", use_tqdm=False)[0]
    assert len(output.prompt_token_ids) == 3
    assert output.outputs[0].text
