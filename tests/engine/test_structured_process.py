"""Masks against brute force: a token is allowed just where the text with it can still match."""

import json

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import validate

from engine.model_source import resolve_model
from engine.structured_outputs.messages import MaskRequest, RowState, RowStatus, Setup
from engine.structured_outputs.params import GrammarSource, StructuredOutputsParams
from engine.tokenizer import Tokenizer
from tests.engine.byte_model import EOS, write_byte_model
from tests.engine.conftest import TINY_LLAMA

WIDTH = TINY_LLAMA["vocab_size"]


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """(the process's module, the tokenizer, the vocabulary)."""
    from engine.structured_outputs import process

    path = write_byte_model(tmp_path_factory.mktemp("bytes") / "model")
    tokenizer = Tokenizer.load(resolve_model(path))
    return process, tokenizer, process.Vocabulary(tokenizer, Setup(path, WIDTH, (EOS,)))


class Output:
    """One output that follows a grammar, token by token."""

    def __init__(self, tools, source):
        self.process, self.tokenizer, vocabulary = tools
        self.matchers = self.process.Matchers(self.process.compile_grammar(source, vocabulary))
        self.tokens, self.num_sent = [], 0

    def allowed(self, unwanted=()):
        row = RowState(0, self.tokens[self.num_sent :], list(unwanted))
        self.num_sent = len(self.tokens)
        masks = np.zeros((1, -(-WIDTH // 32)), dtype=np.int32)
        (status,) = self.matchers.fill(MaskRequest([row], []), masks)
        assert status == RowStatus.MASKED
        words = masks[0].tolist()
        return {t for t in range(WIDTH) if words[t // 32] >> (t % 32) & 1}

    def walk(self, choose, steps):
        """Take tokens that `choose` picks; the text, once the grammar ends it."""
        for _ in range(steps):
            token = choose(sorted(self.allowed()))
            if token == EOS:
                return self.text
            self.tokens.append(token)
        return None

    @property
    def text(self):
        """As the grammar counts it: to xgrammar a surrogate that is encoded is one character."""
        of_token = self.tokenizer.token_bytes(skip_special_tokens=True)
        data = b"".join(of_token[token] for token in self.tokens)
        assert self.tokenizer.decode(self.tokens) == data.decode(errors="replace")
        return data.decode(errors="surrogatepass")


LITERALS = st.sampled_from(["a", "b", "ab", "[a-c]", "[^a]", "1", "\\d", "(ab|12)", "true"])


def joined(parts):
    return st.one_of(
        st.lists(parts, min_size=1, max_size=3).map("".join),
        st.lists(parts, min_size=1, max_size=3).map(lambda each: f"({'|'.join(each)})"),
        st.tuples(parts, st.sampled_from(["*", "+", "?", "{2}", "{1,3}"])).map(
            lambda each: f"({each[0]}){each[1]}"
        ),
    )


REGEXES = st.recursive(LITERALS, joined, max_leaves=5)


@settings(max_examples=25, deadline=None)
@given(pattern=REGEXES, data=st.data())
def test_masks_of_regexes(tools, pattern, data):
    output = Output(tools, GrammarSource("regex", pattern))
    of_token = output.tokenizer.token_bytes(skip_special_tokens=True)
    ascii_tokens = [t for t in range(WIDTH) if of_token[t] and of_token[t].isascii()]
    for _ in range(6):
        allowed = output.allowed()
        text = output.text
        assert (EOS in allowed) == bool(regex.fullmatch(pattern, text))
        expected = {
            token
            for token in ascii_tokens
            if regex.fullmatch(pattern, text + of_token[token].decode(), partial=True)
        }
        assert allowed & set(ascii_tokens) == expected
        if not expected:
            break
        output.tokens.append(data.draw(st.sampled_from(sorted(expected))))


VALUES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-120, 120),
        st.integers(0, 300),
    ),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 4)),
    st.lists(st.sampled_from(["a", "é", '"', 1, None]), min_size=1, max_size=3, unique=True).map(
        lambda each: {"enum": each}
    ),
)


def nested(values):
    return st.one_of(
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most},
            values,
            st.integers(0, 2),
        ),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required & properties.keys()),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from("abc"), values, min_size=1, max_size=2),
            st.sets(st.sampled_from("abc")),
        ),
        st.lists(values, min_size=1, max_size=2).map(lambda each: {"anyOf": each}),
    )


@settings(max_examples=25, deadline=None)
@given(schema=st.recursive(VALUES, nested, max_leaves=4), data=st.data())
def test_whatever_is_drawn_is_valid(tools, schema, data):
    params = StructuredOutputsParams(json=schema, disable_any_whitespace=data.draw(st.booleans()))
    random = data.draw(st.randoms(use_true_random=False))
    text = Output(tools, params.source()).walk(random.choice, steps=400)
    if text is not None:
        validate(json.loads(text), schema)


def test_one_text_only(tools):
    params = StructuredOutputsParams(choice=["true é"])
    output = Output(tools, params.source())
    assert output.walk(lambda allowed: allowed[-1], steps=20) == "true é"


def test_ends_are_kept_back_while_anything_else_is_allowed(tools):
    output = Output(tools, GrammarSource("regex", "aa?"))
    (a,) = output.tokenizer.encode("a")
    output.tokens = [a]
    assert output.allowed() == {a, EOS}
    assert output.allowed(unwanted=[EOS, 31, 63]) == {a}
    output.tokens = [a, a]
    assert output.allowed(unwanted=[EOS]) == {EOS}


def test_what_cannot_go_on_is_told(tools):
    process, tokenizer, vocabulary = tools
    grammar = process.compile_grammar(GrammarSource("regex", "ab"), vocabulary)
    (b,) = tokenizer.encode("b")
    matchers = process.Matchers(grammar)
    rows = [RowState(0, [b], []), RowState(1, [], []), RowState(2, [EOS], [])]
    masks = np.zeros((3, -(-WIDTH // 32)), dtype=np.int32)
    assert matchers.fill(MaskRequest(rows, []), masks) == [
        RowStatus.REJECTED,
        RowStatus.MASKED,
        RowStatus.REJECTED,
    ]


def test_a_vocabulary_that_cannot_spell_the_text_is_told(tools):
    import xgrammar

    info = xgrammar.TokenizerInfo([b"a", b"b", b""], stop_token_ids=[2])
    grammar = xgrammar.GrammarCompiler(info).compile_regex("ac")
    matchers = tools[0].Matchers(grammar)
    asked = MaskRequest([RowState(0, [0], [])], [])
    assert matchers.fill(asked, np.zeros((1, 1), dtype=np.int32)) == [RowStatus.DEAD_END]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object"}, '{"a": {"b": [1, null]}}'),
        ({"type": "array", "minItems": 2}, '[1, "a"]'),
        ({"type": "object", "minProperties": 1}, '{"b": 2}'),
        ({}, "[{}]"),
        ({"type": "object", "properties": {"a": {}}}, '{\n    "a": [\n        1\n    ]\n}'),
    ],
)
def test_schemas_that_leave_much_open(tools, schema, text):
    output = Output(tools, StructuredOutputsParams(json=schema).source())
    output.tokens = output.tokenizer.encode(text)
    assert EOS in output.allowed()


def test_white_space_is_limited(tools):
    output = Output(tools, StructuredOutputsParams(json_object=True).source())
    output.tokens = output.tokenizer.encode("{" + " " * output.process.MAX_WHITESPACE)
    (space,) = output.tokenizer.encode(" ")
    assert space not in output.allowed()
