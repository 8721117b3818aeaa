"""Loading weights: sharded safetensors, GGUF, dummy, and what is wrong with a checkpoint."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config
from transformers import Qwen3ForCausalLM as TransformersQwen3

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.gguf_header import read_gguf_header
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.weights.gguf import read_gguf
from engine.weights.loader import load_model
from engine.weights.safetensors import read_safetensors

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "copy")
    return tmp_path / "copy"


def load(path, **options):
    source = resolve_model(str(path))
    config = EngineConfig(model=str(path), **options)
    shape = read_model_config(source)
    return load_model(config, source, shape, torch.float32, torch.device("cpu"), 64)


def shard(folder, keep=("1", "2")):
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    parts = {"1": names[::2], "2": names[1::2]}
    for number in keep:
        save_file({n: tensors[n] for n in parts[number]}, folder / f"m-{number}.safetensors")
    index = {name: f"m-{number}.safetensors" for number, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()


def test_shards_equal_the_single_file(llama, copied):
    shard(copied)
    single, sharded = dict(read_safetensors(llama)), dict(read_safetensors(copied))
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    load(copied)


def lose_a_shard(folder):
    shard(folder, keep=("1",))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def bad_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def change(name, value):
    def edit(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
        save_file(tensors, path)

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_shard, r"lacks 1 of the 2 weight files.*m-2\.safetensors"),
        (truncate, "damaged or incomplete"),
        (bad_index, "not a valid index"),
        (pickles, "pickles"),
        (no_weights, "has no weights"),
        (change("model.norm.weight", None), r"lacks 1 tensors.*model\.norm\.weight"),
        (change("model.norm.weight", torch.ones(63)), r"model\.norm\.weight.*shape \[63\].*\[64\]"),
        (change("model.layers.0.mlp.router.weight", torch.ones(1)), "router"),
    ],
)
def test_half_there(copied, damage, words):
    damage(copied)
    with pytest.raises(ConfigError, match=words):
        load(copied)


def test_wrong_format(llama):
    with pytest.raises(ConfigError, match="load_format"):
        load(llama, load_format="gguf")


def test_dummy_depends_on_the_seed_alone(llama):
    first, second, other = (load(llama, load_format="dummy", seed=s).embedding for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 0.01 < first.std() < 0.03


def gguf_names(architecture: str, name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor, by the gguf library's own table."""
    kind = gguf.MODEL_ARCH[architecture.upper()]
    table = gguf.get_tensor_name_map(kind, SIZES["num_hidden_layers"])
    return table.get_name(name, try_suffixes=(".weight", ".bias"))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of the llama architecture."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, architecture, tensors, kind, head_dim):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    heads = {"q_proj": 4, "k_proj": 2}
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if architecture == "llama" and (count := heads.get(name.split(".")[-2])):
            values = permuted(values, count)
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(
            gguf_names(architecture, name), gguf.quants.quantize(values, stored), raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "error"),
    [("F32", 0.0), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_0", 0.15), ("Q4_1", 0.15)],
)
def test_gguf_equals_safetensors(llama, tmp_path, kind, error):
    tensors = dict(read_safetensors(llama))
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", tensors, gguf.GGMLQuantizationType[kind], 16)
    read = dict(read_gguf(path, read_model_config(resolve_model(str(path)))))
    assert read.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert (read[name].float() - wanted).norm() <= error * wanted.norm() + 1e-12, name
    load(path)


def test_gguf_of_qwen3(tmp_path):
    torch.manual_seed(1)
    model = TransformersQwen3(Qwen3Config(**SIZES, head_dim=32))
    path = tmp_path / "q.gguf"
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    write_gguf(path, "qwen3", tensors, gguf.GGMLQuantizationType.F32, 32)
    read = dict(read_gguf(path, read_model_config(resolve_model(str(path)))))
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_gguf_cut_short(llama, tmp_path):
    path = tmp_path / "m.gguf"
    tensors = dict(read_safetensors(llama))
    write_gguf(path, "llama", tensors, gguf.GGMLQuantizationType.F32, 16)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ConfigError, match="ends before the data"):
        load(path)


@pytest.mark.slow  # of all tokens of the golden prompts, each depends on them
def test_bundled_weights_equal_transformers():
    source = resolve_model("smollm2-135m-instruct")
    reference = AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32
    ).state_dict()
    read = dict(read_gguf(source.path, read_model_config(source)))
    assert len(read) == len(read_gguf_header(source.path).tensors) == 272
    assert all(torch.equal(read[name], reference[name]) for name in read)
