import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize

from benchmarks.models import BUNDLED_MODEL, find_model, read_vocab_size, write_float32


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


def test_the_bundled_model_is_found():
    assert find_model(BUNDLED_MODEL).endswith(".gguf")
