"""Tokenizers and texts that several tests share."""

import functools
from pathlib import Path

import gguf
import tokenizers
from tokenizers import decoders, models, normalizers

from engine.config import BUNDLED_MODEL
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "  leading, trailing and   inner spaces \n\n\ttabs\r\n",
    "naïve café, Straße, Ελληνικά, русский язык",
    "日本語のテキスト、한국어, 中文。",
    "नमस्ते दुनिया, العربية, עברית",
    "😀👩‍👩‍👧‍👦🇫🇷 emoji, z͑ͫ̓ͪ combining",
    "def f(x):\n    return x**2  # comment\n",
    "It's we'll they'VE I'm",
    "",
]


@functools.cache
def smollm2() -> Tokenizer:
    return Tokenizer.load(resolve_model(BUNDLED_MODEL))


@functools.cache
def sentencepiece_like() -> Tokenizer:
    """Bytes, a few words and `▁`, decoded as Llama 2's tokenizer.json does."""
    words = ["▁", "▁Hello", "Hello", "▁wor", "ld", "▁▁", "é", "▁日本", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def write_gguf(path: Path, values: dict, tensors: dict[str, tuple[int, ...]]) -> Path:
    """Write a GGUF file with the gguf package; tensors are of zeros, shapes in numpy's order."""
    import numpy as np

    writer = gguf.GGUFWriter(str(path), values["general.architecture"])
    adders = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
    for key, value in values.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            adders.get(type(value), writer.add_uint32)(key, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
