"""Files that Torch7's ``torch.save`` wrote: their objects, and their networks as modules.

Both of Torch7's formats are read, ``'binary'`` (of machines of either byte order, with longs of 64
or 32 bits) and ``'ascii'``, as they are or packed with xz or gzip. Nothing in a file is executed,
and whatever the bytes are, the answer is the object or a :class:`Torch7FileError`::

    >>> from mnist_ops import torch7
    >>> model = torch7.load_net("model.net")
    >>> model(images).argmax(1)
"""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .. import _unpack

__all__ = ["MAX_BYTES", "TableKey", "Torch7FileError", "Torch7Object", "is_torch7", "load"]

#: No file is read that is larger than this when unpacked, unless the caller says so.
MAX_BYTES = 2**30
# An object of a few bytes becomes a Python object of a hundred: the objects are limited, too.
_MAX_OBJECTS = 1_000_000
_MAX_DEPTH = 100
_MAX_DIMENSIONS = 64

_NIL, _NUMBER, _STRING, _TABLE, _TORCH, _BOOLEAN, _FUNCTIONS = 0, 1, 2, 3, 4, 5, (6, 7, 8)

_DTYPES: dict[str, torch.dtype] = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
}
# On the GPU: CudaDouble and so on, and Cuda alone for single precision.
_DTYPES |= {f"Cuda{name}": dtype for name, dtype in _DTYPES.items() if name != "Float"}
_DTYPES["Cuda"] = torch.float32
_DATA_CLASS = re.compile(rf"torch\.({'|'.join(_DTYPES)})(Tensor|Storage)")
_NUMPY = {
    dtype: torch.empty(0, dtype=dtype, device="cpu").numpy().dtype.str[1:]
    for dtype in _DTYPES.values()
}
# Numbers of a text that are converted at a time.
_PIECE = 10_000


class Torch7FileError(ValueError):
    """The file cannot be read, is no Torch7 file, is damaged, or holds what is not supported."""


class BadFileError(Exception):
    """What is wrong, without the file's name."""


@dataclass(eq=False, repr=False)
class Torch7Object:
    """An object of a class of Torch7 or its packages, such as ``nn.Linear``.

    Attributes:
        class_name: as registered with Torch7.
        fields: its Lua table.
        version: of its class, as in the file; 0 in a file of Torch7's early days.
    """

    class_name: str
    fields: dict[Any, Any]
    version: int = 1

    def __repr__(self) -> str:
        return f"Torch7Object({self.class_name!r}, fields {', '.join(map(str, self.fields))})"


@dataclass(eq=False, frozen=True)
class TableKey:
    """A Lua table that is a key of another table, as nngraph has them.

    Two of them are equal where the table is the same one, as in Lua: a Python dict or list could
    not be a key.
    """

    table: dict[Any, Any] | list[Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TableKey) and other.table is self.table

    def __hash__(self) -> int:
        return id(self.table)


class Reader:
    """Reads one object, in the binary format; :class:`_AsciiReader` reads the other.

    Args:
        content: of the file, unpacked.
        order: ``"<"`` for a file of a little-endian machine, ``">"`` of a big-endian one.
        long_size: bytes of its C type long: 8, or 4 on 32-bit machines and Windows.

    Attributes:
        objects: all Torch7 objects that were read.
        classes: the names of all classes.
    """

    def __init__(self, content: bytes | bytearray, order: str = "<", long_size: int = 8) -> None:
        self.content = content
        self.position = 0
        self.objects: list[Torch7Object] = []
        self.classes: set[str] = set()
        self.has_longs = False
        self._order = order
        self._integer = struct.Struct(f"{order}i")
        self._double = struct.Struct(f"{order}d")
        self._long = np.dtype(f"{order}i{long_size}")
        self._count = 0
        self._memo: dict[int, Any] = {}
        self._unfinished: set[int] = set()
        self._cyclic: set[int] = set()
        self._storages: set[int] = set()

    def take(self, count: int) -> int:
        """Go ``count`` bytes on; return where they begin."""
        start = self.position
        if count > len(self.content) - start:
            raise BadFileError(
                f"is truncated at byte {len(self.content)}: {count} bytes were to follow "
                f"from byte {start}"
            )
        self.position = start + count
        return start

    def bad(self, what: str) -> BadFileError:
        return BadFileError(f"is damaged before byte {self.position}: {what}")

    def array(self, dtype: torch.dtype, count: int) -> np.ndarray:
        """``count`` numbers, a copy of its own."""
        code = np.dtype(self._order + _NUMPY[dtype])
        if dtype == torch.int64:
            self.has_longs, code = True, self._long
        start = self.take(count * code.itemsize)
        return np.frombuffer(self.content, code, count, start).astype(_NUMPY[dtype])

    def chars(self, count: int) -> bytes:
        start = self.take(count)
        return bytes(self.content[start : self.position])

    def integer(self) -> int:
        return self._integer.unpack_from(self.content, self.take(4))[0]

    def double(self) -> float:
        return self._double.unpack_from(self.content, self.take(8))[0]

    def count(self, what: str) -> int:
        value = self.integer()
        if value < 0:
            raise self.bad(f"{what} is {value}")
        return value

    def string(self) -> str:
        return self.chars(self.count("a string's length")).decode("utf-8", "surrogateescape")

    def number(self) -> int | float:
        value = self.double()
        return int(value) if value.is_integer() and abs(value) < 2**53 else value

    def whole(self) -> Any:
        """The file's object; nothing may follow it."""
        result = self.object(0)
        if rest := len(self.content) - self.position:
            raise BadFileError(
                f"is damaged: its object ends at byte {self.position}, {rest} more follow"
            )
        return result

    def object(self, depth: int) -> Any:
        """The next object of any type."""
        self._count += 1
        if self._count > _MAX_OBJECTS:
            raise BadFileError(f"holds more than {_MAX_OBJECTS:,} objects")
        if depth > _MAX_DEPTH:
            raise BadFileError(f"is nested deeper than {_MAX_DEPTH} levels at byte {self.position}")
        kind = self.integer()
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            return self.number()
        if kind == _STRING:
            return self.string()
        if kind == _BOOLEAN:
            value = self.integer()
            if value not in (0, 1):
                raise self.bad(f"a boolean is {value}")
            return value == 1
        if kind in _FUNCTIONS:
            raise BadFileError(
                f"holds a Lua function before byte {self.position}: compiled code is never loaded"
            )
        if kind not in (_TABLE, _TORCH):
            raise self.bad(f"there is no type of objects {kind}")
        index = self.integer()
        if index in self._memo:
            if index in self._unfinished:
                self._cyclic.add(index)
            return self._memo[index]
        if kind == _TABLE:
            return self.table(index, self.count("a table's size"), depth + 1)
        return self.torch_object(index, depth + 1)

    def table(self, index: int, size: int, depth: int) -> Any:
        entries: dict[Any, Any] = {}
        self._memo[index] = entries
        self._unfinished.add(index)
        for _ in range(size):
            key = self.object(depth)
            if key is None or (isinstance(key, float) and key != key):
                raise self.bad(f"a table's key is {'nil' if key is None else 'not a number'}")
            if isinstance(key, (dict, list)):
                key = TableKey(key)
            if key in entries:
                known = next(each for each in entries if each is key or each == key)
                if isinstance(key, bool) != isinstance(known, bool):  # two in Lua, one in Python
                    raise BadFileError(
                        "holds what is not supported: a table with the keys "
                        f"{int(key)} and {str(bool(key)).lower()} (before byte {self.position})"
                    )
                raise self.bad(f"a table has the key {key!r:.60} twice")
            entries[key] = self.object(depth)
        self._unfinished.discard(index)
        # A table that contains itself is known by its dict already, so that it stays one.
        listed = all(type(key) is int and 1 <= key <= len(entries) for key in entries)
        if entries and listed and index not in self._cyclic:
            self._memo[index] = [entries[i] for i in range(1, len(entries) + 1)]
        return self._memo[index]

    def torch_object(self, index: int, depth: int) -> Any:
        name, version = self.string(), 0
        if numbered := re.fullmatch(r"V (\d{1,9})", name, re.ASCII):
            name, version = self.string(), int(numbered[1])
        if not re.fullmatch(r"[A-Za-z_][\w.]{0,200}", name, re.ASCII):
            raise self.bad(f"a class has the name {name[:40]!r}")
        self.classes.add(name)
        if data := _DATA_CLASS.fullmatch(name):
            dtype = _DTYPES[data[1]]
            if data[2] == "Storage":
                self._memo[index] = self.storage(dtype)
            else:
                self._memo[index] = self.tensor(name, dtype, depth)
            return self._memo[index]
        if name in ("tds.Hash", "tds_hash"):
            return self.table(index, self.long(f"a {name}'s size"), depth)
        if name == "tds.Vec":
            items: list[Any] = []
            self._memo[index] = items
            items.extend(self.object(depth) for _ in range(self.long("a tds.Vec's size")))
            return items
        if name == "tds.AtomicCounter":
            self._memo[index] = self.longs(1)[0]
            return self._memo[index]
        result = self._memo[index] = Torch7Object(name, {}, version)
        self.objects.append(result)
        fields = self.object(depth)
        if isinstance(fields, list):
            fields = dict(enumerate(fields, 1))
        if not isinstance(fields, dict):
            raise BadFileError(
                f"holds an object of the class {name}, which is stored in a way of its own that "
                f"is not supported (before byte {self.position})"
            )
        result.fields = fields
        return result

    def longs(self, count: int) -> list[int]:
        return self.array(torch.int64, count).tolist()

    def long(self, what: str) -> int:
        value = self.longs(1)[0]
        if value < 0:
            raise self.bad(f"{what} is {value}")
        return value

    def storage(self, dtype: torch.dtype) -> Tensor:
        storage = torch.from_numpy(self.array(dtype, self.long("a storage's size")))
        self._storages.add(id(storage))
        return storage

    def tensor(self, name: str, dtype: torch.dtype, depth: int) -> Tensor:
        dimensions = self.count("a tensor's number of dimensions")
        if dimensions > _MAX_DIMENSIONS:
            raise self.bad(f"a tensor has {dimensions} dimensions")
        size, stride = self.longs(dimensions), self.longs(dimensions)
        offset = self.longs(1)[0] - 1
        storage = self.object(depth)
        if storage is None or dimensions == 0:
            if dimensions:
                raise self.bad(f"a {name} of size {size} has no storage")
            return torch.empty(0, dtype=dtype)
        if id(storage) not in self._storages or storage.dtype != dtype:
            raise self.bad(f"a {name} has a storage of another type")
        most = math.prod(max(n, 1) for n in size)
        if min(size) < 0 or min(stride) < 0 or offset < 0 or most >= 2**60:
            raise self.bad(f"a {name} has size {size}, stride {stride} and offset {offset}")
        if 0 in size:
            return torch.empty(size, dtype=dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= len(storage):
            raise self.bad(f"a {name} of size {size} reaches beyond its storage of {len(storage)}")
        # Of a dimension of size 1 the stride means nothing, but torch would multiply by it.
        stride = [step if n > 1 else 1 for n, step in zip(size, stride, strict=True)]
        return storage.as_strided(size, stride, offset)


class _AsciiReader(Reader):
    """Numbers as text, separated by spaces and line ends; bytes and strings as they are."""

    _TOKEN = re.compile(rb"[ \t\r\n]*([-+.0-9A-Za-z]{1,40})(?![-+.0-9A-Za-z])")

    def array(self, dtype: torch.dtype, count: int) -> np.ndarray:
        code = np.dtype(_NUMPY[dtype])
        if code.itemsize == 1:
            return np.frombuffer(self.chars(count), code).copy()
        if 2 * count - 1 > len(self.content) - self.position:
            raise BadFileError(
                f"is truncated at byte {len(self.content)}: {count} numbers were to follow "
                f"from byte {self.position}"
            )
        convert: Callable[[bytes], int | float] = float if dtype.is_floating_point else int
        result = np.empty(count, code)
        try:
            with np.errstate(over="ignore"):
                for start in range(0, count, _PIECE):
                    piece = result[start : start + _PIECE]
                    piece[:] = [self._token(convert) for _ in range(len(piece))]
        except OverflowError:
            raise self.bad("a number is too large for its type") from None
        self._end_of_line(count)
        return result

    def integer(self) -> int:
        value = int(self._token(int))
        self._end_of_line(1)
        if not -(2**31) <= value < 2**31:
            raise self.bad("a number is too large for its type")
        return value

    def double(self) -> float:
        value = float(self._token(float))
        self._end_of_line(1)
        return value

    def _token(self, convert: Callable[[bytes], int | float]) -> int | float:
        token = self._TOKEN.match(self.content, self.position)
        if token is None:
            if not self.content[self.position : self.position + 1000].strip():
                raise BadFileError(
                    f"is truncated at byte {len(self.content)}: a number was to follow"
                )
            raise self.bad("a number is missing")
        self.position = token.end()
        try:
            return convert(token[1])
        except ValueError:
            raise self.bad(f"{bytes(token[1])!r} is no number") from None

    def chars(self, count: int) -> bytes:
        piece = super().chars(count)
        self._end_of_line(count)
        return piece

    def _end_of_line(self, count: int) -> None:
        if count and self.content[self.position : self.position + 1] == b"\n":
            self.position += 1


def _is_ascii(content: bytes | bytearray) -> bool:
    return re.match(rb"[0-8][ \n]", content) is not None


def _byte_order(content: bytes | bytearray) -> str | None:
    """Of a binary file, by its first number, a type of objects."""
    for order, byte, zeros in (("<", content[:1], content[1:4]), (">", content[3:4], content[:3])):
        if zeros == b"\0\0\0" and byte and byte[0] <= max(_FUNCTIONS):
            return order
    return None


def is_torch7(content: bytes) -> bool:
    """Whether a file that begins with ``content``, six bytes at least, may be of Torch7.

    True also for what is packed with xz or gzip, whatever is inside.
    """
    return _unpack.is_packed(content) or _byte_order(content) is not None or _is_ascii(content)


def read(
    file: str | os.PathLike[str] | BinaryIO, max_bytes: int | None
) -> tuple[str, bytes | bytearray]:
    """The file's name and its unpacked content."""
    limit = MAX_BYTES if max_bytes is None else max_bytes
    name = str(getattr(file, "name", "<file>"))
    try:
        if isinstance(file, (str, os.PathLike)):
            name, path = os.fspath(file), Path(file)
            if not path.is_file():
                state = "is not a file" if path.exists() else "does not exist"
                raise Torch7FileError(f"{name} {state}")
            with open(path, "rb") as opened:
                content = _unpack.read(opened, limit)
        else:
            content = _unpack.read(file, limit)
        if _unpack.is_packed(content):
            packed = len(content)
            if max_bytes is None:
                limit = _unpack.limit_of(packed, MAX_BYTES)
            content = _unpack.unpack(content, limit)
    except _unpack.TooLargeError:
        raise Torch7FileError(
            f"{name} is larger than {limit:,} bytes when unpacked: max_bytes, unless given "
            f"{MAX_BYTES:,} and 100 times the packed size, is the limit"
        ) from None
    except EOFError:
        raise Torch7FileError(f"{name} is truncated: its packed data has no end") from None
    except (_unpack.LZMAError, zlib.error) as error:
        raise Torch7FileError(f"{name} is damaged: it cannot be unpacked ({error})") from None
    except MemoryError:
        raise Torch7FileError(f"{name} needs more memory than there is") from None
    except TypeError:
        raise Torch7FileError(f"{name} must be a path or opened for reading bytes") from None
    except OSError as error:
        raise Torch7FileError(f"{name} cannot be read: {error.strerror or error}") from None
    return name, content


def parse(content: bytes | bytearray) -> tuple[Any, Reader]:
    """The file's object, and the reader that knows what else was met."""
    if not content:
        raise BadFileError("is empty")
    order = _byte_order(content)
    if _is_ascii(content):
        readers: list[Reader] = [_AsciiReader(content)]
    elif order is not None:
        # The file does not say how long its longs are; read the wrong way, it makes no sense.
        readers = [Reader(content, order, 8), Reader(content, order, 4)]
    else:
        raise BadFileError(f"is not a Torch7 file: it begins with {bytes(content[:8])!r}")
    failures: list[BadFileError] = []
    for reader in readers:
        try:
            return reader.whole(), reader
        except BadFileError as bad:
            failures.append(bad)
            if not reader.has_longs:
                break
    # That of the reader that came further.
    furthest = max(range(len(failures)), key=lambda i: readers[i].position)
    raise failures[furthest] from None


def guarded(name: str, work: Callable[[], Any]) -> Any:
    """What ``work`` returns; whatever a hostile file makes it stumble over is a Torch7FileError."""
    try:
        return work()
    except BadFileError as bad:
        raise Torch7FileError(f"{name} {bad}") from None
    except MemoryError:
        raise Torch7FileError(f"{name} needs more memory than there is") from None
    except RecursionError:
        raise Torch7FileError(f"{name} is nested too deeply") from None
    except (
        ArithmeticError,
        LookupError,
        RuntimeError,
        struct.error,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise Torch7FileError(f"{name} is damaged: {type(error).__name__}: {reason}") from None


def load(file: str | os.PathLike[str] | BinaryIO, max_bytes: int | None = None) -> Any:
    r"""The object that ``torch.save`` wrote, as plain Python objects.

    Numbers become int where they are whole, else float; strings str (bytes that are no UTF-8 as
    surrogates); tables lists where their keys are 1 to n with n >= 1, else dicts; tensors and
    storages tensors of the same dtype (``torch.CudaTensor``: float32, ``torch.CudaDoubleTensor``:
    float64 and so on), which share memory where they did; a ``tds.Hash`` becomes a table, a
    ``tds.Vec`` a list; everything else is a :class:`Torch7Object`. What occurs twice is one object.
    A table that is another's key is held by a :class:`TableKey`.

    Args:
        file: a path, or a file opened for reading bytes. Packed or not, the byte order and the
            length of longs are told by its content.
        max_bytes: a larger file, unpacked, is refused. Unless given it is :data:`MAX_BYTES`, and
            for a packed file 100 times its packed size (or 16 MiB), if that is less.

    Raises:
        Torch7FileError: if the file is missing, too large, truncated, damaged or something else, or
            if it holds a Lua function, an object stored in a way of its class's own, a table with
            the keys 1 and true, more than a million objects, or more than 100 levels of them.

    Source: Torch7's ``File.lua`` and ``DiskFile``, February 2016; cutorch and tds.

    Example::

        >>> import io
        >>> load(io.BytesIO(b"3\n1\n1\n2\n1\nx\n1\n0.5\n"))
        {'x': 0.5}
    """
    name, content = read(file, max_bytes)
    return guarded(name, lambda: parse(content)[0])
