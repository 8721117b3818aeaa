import pytest
import tokenizers
from tokenizers import models

from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer
from tests.engine.tokenizer_cases import smollm2


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
