import json

import pytest
from gguf import GGUFReader

from engine.config import BUNDLED_MODEL
from engine.errors import ConfigError
from engine.gguf_header import read_gguf_header
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from tests.engine.tokenizer_cases import write_gguf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "sliding_window": 32, "max_window_layers": 3}


def read(folder, config, **files):
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return read_model_config(resolve_model(str(folder)))


def test_shape(tmp_path):
    config = read(tmp_path, {**LLAMA, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5})
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (128, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (3, 8, 2)
    assert (config.head_dim, config.max_position_embeddings) == (8, 256)
    assert (config.dtype, config.rms_norm_eps) == ("bfloat16", 1e-5)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert not config.tie_word_embeddings
    assert not config.attention_bias


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_transformers_saves_is_read_as_transformers_means_it(family, tmp_path):
    import transformers

    theirs = getattr(transformers, f"{family}Config")(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    )
    theirs.save_pretrained(tmp_path)
    ours = read_model_config(resolve_model(str(tmp_path)))
    assert ours.architecture == f"{family}ForCausalLM"
    assert ours.tie_word_embeddings
    assert ours.attention_bias == (family == "Qwen2")
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling == {}
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.max_position_embeddings == theirs.max_position_embeddings


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, {}),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6, {}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            1e4,
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64}},
            1e4,
            {"rope_type": "llama3", "original_max_position_embeddings": 64},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7.0}},
            7.0,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ),
    ],
)
def test_rotary_parameters_of_both_generations(keys, theta, scaling, tmp_path):
    config = read(tmp_path, LLAMA | keys)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({}, None),
        ({"use_sliding_window": False}, None),
        ({"use_sliding_window": True}, None),  # all layers lie below max_window_layers
        ({"use_sliding_window": True, "max_window_layers": 0}, 32),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 32),
        ({"model_type": "mistral"}, 32),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "llama"}, None),
    ],
)
def test_sliding_window_only_where_it_is_used(keys, window, tmp_path):
    assert read(tmp_path, QWEN2 | keys).sliding_window == window


def test_end_tokens_of_generation_and_tokenizer_are_added(tmp_path):
    config = read(
        tmp_path,
        LLAMA,
        generation_config={"eos_token_id": [3, 2]},
        tokenizer_config={
            "eos_token": {"content": "<end>"},
            "added_tokens_decoder": {"4": {"content": "<end>"}, "5": {"content": "<pad>"}},
        },
    )
    assert config.eos_token_ids == (2, 3, 4)


def test_end_token_of_the_tokenizer_from_tokenizer_json(tmp_path):
    config = read(
        tmp_path,
        LLAMA,
        tokenizer_config={"eos_token": "<end>"},
        tokenizer={"added_tokens": [{"id": 7, "content": "<end>"}]},
    )
    assert config.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": 128}, "eos_token_id"),
    ],
)
def test_bad_values_are_named(keys, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        read(tmp_path, LLAMA | keys)


def test_a_window_for_some_layers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="use_sliding_window"):
        read(tmp_path, QWEN2 | {"use_sliding_window": True, "max_window_layers": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_broken_json_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(resolve_model(str(tmp_path)))


def test_bundled_model():
    config = read_model_config(resolve_model(BUNDLED_MODEL))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.max_position_embeddings) == (64, 8192)
    assert config.rope_theta == 100000.0
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)


GGUF = {
    "general.architecture": "qwen3",
    "general.file_type": 1,
    "qwen3.block_count": 2,
    "qwen3.context_length": 512,
    "qwen3.embedding_length": 64,
    "qwen3.feed_forward_length": 96,
    "qwen3.attention.head_count": 4,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.attention.key_length": 32,
    "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen3.rope.freq_base": 1e6,
    "tokenizer.ggml.tokens": ["a", "b", "ü"],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
    "tokenizer.ggml.eos_token_id": 5,
    "tokenizer.ggml.eot_token_id": 6,
    "tokenizer.ggml.add_bos_token": False,
}
TENSORS = {"token_embd.weight": (100, 64), "output.weight": (100, 64)}


def test_gguf_metadata(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", GGUF, TENSORS)
    config = read_model_config(resolve_model(str(path)))
    assert config.architecture == "Qwen3ForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.head_dim) == (100, 64, 32)
    assert (config.num_heads, config.num_kv_heads, config.rope_theta) == (4, 2, 1e6)
    assert (config.dtype, config.eos_token_ids) == ("float16", (5, 6))
    assert not config.tie_word_embeddings
    assert not config.attention_bias


def test_gguf_tied_embeddings_and_bias_show_in_the_tensors(tmp_path):
    tensors = {"token_embd.weight": (100, 64), "blk.0.attn_q.bias": (64,)}
    config = read_model_config(resolve_model(str(write_gguf(tmp_path / "m.gguf", GGUF, tensors))))
    assert config.tie_word_embeddings
    assert config.attention_bias


def test_gguf_scaled_rotary_embeddings(tmp_path):
    keys = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 128,
    }
    path = write_gguf(tmp_path / "m.gguf", GGUF | keys, TENSORS)
    assert read_model_config(resolve_model(str(path))).rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


@pytest.mark.parametrize(
    ("keys", "tensors", "named"),
    [
        ({"general.architecture": "mamba"}, TENSORS, "general.architecture"),
        ({"qwen3.block_count": 0}, TENSORS, "qwen3.block_count"),
        ({}, {"output.weight": (100, 64)}, "token_embd.weight"),
        ({}, TENSORS | {"rope_freqs.weight": (16,)}, "rope_freqs.weight"),
    ],
)
def test_bad_gguf_values_are_named(keys, tensors, named, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", GGUF | keys, tensors)
    with pytest.raises(ConfigError, match=named):
        read_model_config(resolve_model(str(path)))


def test_header_agrees_with_the_gguf_package(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", GGUF, TENSORS)
    reader = GGUFReader(str(path))
    theirs = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    header = read_gguf_header(path)
    ours = {k: list(v) if isinstance(v, tuple) else v for k, v in header.metadata.items()}
    assert ours == theirs
    assert {t.name: tuple(t.shape.tolist()) for t in reader.tensors} == {
        name: tensor.shape for name, tensor in header.tensors.items()
    }


def test_every_truncation_of_a_gguf_header_is_an_error(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", GGUF, TENSORS).read_bytes()
    end = whole.index(b"output.weight") + 13 + 4 + 16 + 4 + 8  # the last tensor's entry
    path = tmp_path / "short.gguf"
    for size in range(end):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            read_gguf_header(path)


@pytest.mark.parametrize(
    "content", [b"not a model", b"GGUF\x00\x00\x00\x03", b"GGUF\x01\x00\x00\x00" + b"\xff" * 64]
)
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        read_gguf_header(path)


def test_absurd_counts_do_not_exhaust_memory(tmp_path):
    path = tmp_path / "m.gguf"
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
    array = (4).to_bytes(4, "little") + (2**60).to_bytes(8, "little")
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little")
    path.write_bytes(head + (1).to_bytes(8, "little") + key + array)
    with pytest.raises(ConfigError, match="damaged"):
        read_gguf_header(path)
