"""Reads the header of a GGUF file: metadata and the list of tensors, not the tensors' data.

Layout as in the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md). The `gguf` package
reads the same, but wraps every string of the vocabulary in arrays and takes a second for it.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32


@dataclass(slots=True, frozen=True)
class GgufTensor:
    """Where one tensor lies."""

    shape: tuple[int, ...]
    """Dimensions in GGUF's order: the one that varies fastest comes first."""
    ggml_type: int
    offset: int
    """Byte offset from the start of the tensor data."""


@dataclass(slots=True, frozen=True)
class GgufHeader:
    """Metadata and tensor list of a GGUF file."""

    metadata: dict[str, Any]
    """Key → number, bool, str, or a sequence of them."""
    tensors: dict[str, GgufTensor]
    data_offset: int
    """Byte offset of the tensor data in the file."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a little-endian GGUF file of version 2 or 3.

    Raises:
        ConfigError: the file is not such a file, or ends early.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data, path)
    except (struct.error, UnicodeDecodeError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is damaged or incomplete ({error}); fetch it again.") from error


def _parse(data: mmap.mmap, path: Path) -> GgufHeader:
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise ConfigError(f"{path} is not a GGUF file; give a .gguf file or a model directory.")
    cursor.offset = 4
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ConfigError(
            f"{path} is a GGUF file of version {version} or big-endian; "
            f"convert it to little-endian version {_VERSIONS[-1]}."
        )
    num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(num_keys)}
    tensors = {cursor.string(): cursor.tensor() for _ in range(num_tensors)}
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    return GgufHeader(metadata, tensors, -(-cursor.offset // alignment) * alignment)


class _Cursor:
    """Takes values off the bytes of a file, one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        if count > len(self.data):  # before a format of that length is built
            raise ValueError("an array is longer than the file")
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return values

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        data, offset, texts = self.data, self.offset, []
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = offset + 8
            offset = start + length_at(data, offset)[0]
            texts.append(data[start:offset].decode())
        if offset > len(data):
            raise ValueError("a string goes past the end")
        self.offset = offset
        return texts

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"unknown value type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            return self.scalars(_SCALARS[item], count)
        if item == _STRING:
            return self.strings(count)
        return [self.value(item) for _ in range(count)]

    def tensor(self) -> GgufTensor:
        shape = self.scalars("Q", self.scalar("I"))
        return GgufTensor(shape, self.scalar("I"), self.scalar("Q"))
