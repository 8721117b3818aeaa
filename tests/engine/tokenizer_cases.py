"""Tokenizers and texts that several tests share."""

import functools
from pathlib import Path

import gguf
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from engine import detokenizer
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

NUMBERS = ["0123456789", "In 2024, 3.14159 and 1,000,000", "a1b22c333", "١٢٣ ²"]
SOURCE_CODE = Path(detokenizer.__file__).read_text()

CORPUS = [
    *TEXTS,
    "👍🏽 🧑🏿‍🚀 🏴󠁧󠁢󠁳󠁣󠁴󠁿 ❤️‍🔥 1️⃣ ☎︎ 👨🏻‍❤️‍💋‍👨🏿 🇺🇦🇯🇵",  # skin tones, joiners, tags, selectors
    "ไทยไม่มีช่องว่าง, ភាសាខ្មែរ, မြန်မာ, བོད་ཡིག, አማርኛ, ქართული, հայերեն, ᏣᎳᎩ",
    "বাংলা, தமிழ், తెలుగు, മലയാളം, ਪੰਜਾਬੀ, සිංහල, ગુજરાતી",
    "Tiếng Việt, Türkçe İıŞş, íslenska þæð, čeština, ŁódŹ, ﬁ ligature, e\u0301 é",
    "한글 \u1112\u1161\u11ab, 𠮷野家 𩸽, ｶﾀｶﾅ ｱﾞ, 「引用」、〜ー",
    "שָׁלוֹם \u202bعَرَبِيّ\u202c اردو، فارسی‌ها \u200f.",  # noqa: RUF001
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, 🄰🅱️ ½ ⅷ ② ﷽ 🜁 𓀀 𐍈",  # noqa: RUF001
    "\ufeffBOM, \u00a0no-break\u2003em\u3000wide, soft\u00adhyphen, zero\u200bwidth, \U0010fffd",
    "tab\tnewline\nreturn\r\nform\x0cnext\x85line\u2028paragraph\u2029",
    "🙂" * 40 + "é" * 40 + "漢" * 40,
]
"""Scripts of all kinds and emoji; every one decodes to itself."""


@functools.cache
def smollm2() -> Tokenizer:
    return Tokenizer.load(resolve_model(BUNDLED_MODEL))


@functools.cache
def sentencepiece_like() -> Tokenizer:
    """Bytes, a few words and `▁`, decoded as Llama 2's tokenizer.json does."""
    backend = _with_byte_fallback()
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
    return _with_ends(backend)


@functools.cache
def metaspace_like() -> Tokenizer:
    """The same vocabulary as newer conversions of Mistral's have it, a space before the text."""
    return _metaspace("first")


@functools.cache
def bare_metaspace_like() -> Tokenizer:
    """The same without a space before the text."""
    return _metaspace("never")


def _metaspace(scheme: str) -> Tokenizer:
    backend = _with_byte_fallback()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace("▁", scheme, split=False)]
    )
    return _with_ends(backend)


def _with_byte_fallback() -> tokenizers.Tokenizer:
    words = ["▁", "▁Hello", "Hello", "▁wor", "ld", "▁▁", "é", "▁日本", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    return tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )


def _with_ends(backend: tokenizers.Tokenizer) -> Tokenizer:
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
