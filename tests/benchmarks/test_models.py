import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize

from benchmarks.models import (
    BUNDLED_MODEL,
    SHAPES,
    find_model,
    find_shape,
    read_vocab_size,
    write_float32,
)
from engine.model_config import read_model_config
from engine.model_source import resolve_model


@pytest.fixture
def quantized(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_token_list(["a", "b", "c"])
    weights = np.linspace(-1, 1, 128, dtype=np.float32).reshape(4, 32)
    writer.add_tensor(
        "w", quantize(weights, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("norm", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


def test_the_float32_copy_keeps_metadata_and_values(quantized, tmp_path):
    path, weights = quantized
    copy = tmp_path / "copy.gguf"
    write_float32(str(path), str(copy))
    reader = GGUFReader(copy)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {t.tensor_type.name for t in reader.tensors} == {"F32"}
    np.testing.assert_allclose(tensors["w"].data, weights, atol=0.01)
    np.testing.assert_array_equal(tensors["norm"].data, np.ones(4))
    assert reader.fields["general.name"].contents() == "tiny"
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "c"]


def test_the_vocabulary_is_counted_in_both_formats(quantized, tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    assert read_vocab_size(str(quantized[0])) == 3
    assert read_vocab_size(str(tmp_path)) == 7


def test_shapes_are_found_by_name_and_read_by_the_engine():
    configs = {
        f.name: read_model_config(resolve_model(find_model(f.name))) for f in SHAPES.iterdir()
    }
    qwen = configs["qwen2.5-7b"]
    assert (qwen.num_layers, qwen.num_heads, qwen.num_kv_heads, qwen.head_dim) == (28, 28, 4, 128)
    assert (qwen.vocab_size, qwen.attention_bias, qwen.tie_word_embeddings) == (152064, True, False)
    small = configs["qwen3-0.6b"]
    assert (small.num_heads, small.num_kv_heads, small.head_dim) == (16, 8, 128)
    assert (small.dtype, small.tie_word_embeddings, small.sliding_window) == (
        "bfloat16",
        True,
        None,
    )
    assert find_shape("no-such-shape") is None
    assert find_shape("../shapes/qwen3-0.6b") is None


def test_the_bundled_model_is_found():
    assert find_model(BUNDLED_MODEL).endswith(".gguf")
