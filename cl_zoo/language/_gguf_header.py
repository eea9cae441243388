"""The lengths that a GGUF file's header states, checked before a library allocates or loops by them."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

__all__ = ["check_gguf_header"]

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each type of value but text (8) and arrays (9)."""
_TEXT, _ARRAY, _DEEPEST, _DIMENSIONS = 8, 9, 2, 4


def check_gguf_header(path: Path, quant_sizes: Any) -> None:
    """Refuses a file whose counts, lengths or offsets do not fit into it.

    Args:
      path: the file.
      quant_sizes: `{type: (numbers per block, bytes per block)}`, as the library gguf has them.

    Raises:
      ValueError: what does not fit, and where.
    """
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{path} is not a complete GGUF file: it has {size} bytes")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(path, data, size).file({int(kind): sizes for kind, sizes in quant_sizes.items()})


class _Walk:
    """From field to field of a file."""

    def __init__(self, path: Path, data: Any, size: int):
        self.path, self.data, self.size, self.at = path, data, size, 0

    def refuse(self, said: str) -> ValueError:
        return ValueError(f"{self.path} is not a complete GGUF file: {said}, at byte {self.at} of {self.size}")

    def skip(self, n: int, what: str) -> None:
        if n > self.size - self.at:
            raise self.refuse(f"{what} of {n} bytes")
        self.at += n

    def number(self, form: str, what: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form), what)
        return int(struct.unpack_from(form, self.data, start)[0])

    def text(self, what: str) -> bytes:
        n = self.number("<Q", f"length of {what}")
        start = self.at
        self.skip(n, what)
        return bytes(self.data[start : min(self.at, start + 256)])

    def count(self, n: int, least: int, what: str) -> int:
        """n of things that take at least so many bytes each."""
        if n * least > self.size - self.at:
            raise self.refuse(f"{n} {what}")
        return n

    def value(self, kind: int, deep: int = 0) -> None:
        if kind in _SIZES:
            self.skip(_SIZES[kind], "a number")
        elif kind == _TEXT:
            self.text("a text")
        elif kind == _ARRAY and deep < _DEEPEST:
            inner, n = self.number("<I", "a type"), self.number("<Q", "a length")
            if inner in _SIZES:
                self.skip(n * _SIZES[inner], "an array")
            else:
                for _ in range(self.count(n, 8, "values in an array")):
                    self.value(inner, deep + 1)
        else:
            raise self.refuse(f"a value of the type {kind}")

    def file(self, quants: dict[int, tuple[int, int]]) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it begins with {bytes(self.data[:4])!r}")
        self.at = 4
        version = self.number("<I", "version")
        if version not in (2, 3):
            raise self.refuse(f"version {version}, but 2 and 3 are read")
        tensors, fields = self.number("<Q", "count"), self.number("<Q", "count")
        alignment, names = 32, set()
        for _ in range(self.count(fields, 13, "fields")):
            name, kind = self.text("a name"), self.number("<I", "a type")
            if name in names:
                raise self.refuse(f"the field {name!r} twice")
            names.add(name)
            start = self.at
            self.value(kind)
            if name == b"general.alignment":
                if kind != 4:
                    raise self.refuse("general.alignment of another type than u32")
                alignment = struct.unpack_from("<I", self.data, start)[0]
                if alignment == 0 or alignment & (alignment - 1) or alignment > 1 << 16:
                    raise self.refuse(f"general.alignment {alignment}")
        self.tensors(self.count(tensors, 24, "tensors"), alignment, quants)

    def tensors(self, n: int, alignment: int, quants: dict[int, tuple[int, int]]) -> None:
        found, names = [], set()
        for _ in range(n):
            name, dimensions = self.text("a tensor's name"), self.number("<I", "a number of axes")
            if name in names or not 0 < dimensions <= _DIMENSIONS:
                raise self.refuse(f"the tensor {name!r} twice" if name in names else f"{dimensions} axes")
            names.add(name)
            numbers = 1
            for _ in range(dimensions):
                numbers *= self.number("<Q", "an axis")
            kind, offset = self.number("<I", "a type"), self.number("<Q", "an offset")
            if kind not in quants:
                raise self.refuse(f"{name!r} of the type {kind}")
            per_block, block = quants[kind]
            if numbers == 0 or numbers % per_block:
                raise self.refuse(f"{name!r} of {numbers} numbers in blocks of {per_block}")
            found.append((offset, numbers // per_block * block, name))
        begin, end = -(-self.at // alignment) * alignment, 0
        for offset, length, name in sorted(found):
            if offset < end:
                raise self.refuse(f"{name!r} shares bytes with another tensor")
            end = offset + length
            if begin + end > self.size:
                raise ValueError(f"{self.path} is cut off: {name!r} ends beyond its {self.size} bytes")
