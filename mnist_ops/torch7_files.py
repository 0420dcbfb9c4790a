"""Files that Torch7's ``torch.save`` wrote: their objects, and their networks as modules.

Both of Torch7's formats are read, ``'binary'`` (little-endian, 64-bit longs) and ``'ascii'``, as
they are or packed with xz or gzip. Nothing in a file is executed, and whatever the bytes are, the
answer is the object or a :class:`Torch7FileError`::

    >>> from mnist_ops import torch7
    >>> model = torch7.load_net("model.net")
    >>> model(images).argmax(1)
"""

from __future__ import annotations

import gzip
import io
import lzma
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
from torch import Tensor, nn
from torch.nn.utils import skip_init

from . import nn as ops_nn
from . import torch7

__all__ = ["MAX_BYTES", "Torch7FileError", "Torch7Object", "is_torch7", "load", "load_net"]

#: No file is read that is larger than this when unpacked, unless the caller says so.
MAX_BYTES = 2**30
# An object of a few bytes becomes a Python object of a hundred: the objects are limited, too.
_MAX_OBJECTS = 1_000_000
_MAX_DEPTH = 100
_MAX_DIMENSIONS = 64
# Layers that share their weights share the file's bytes, but become modules of their own.
_MAX_SHARING = 16

_NIL, _NUMBER, _STRING, _TABLE, _TORCH, _BOOLEAN, _FUNCTIONS = 0, 1, 2, 3, 4, 5, (6, 7, 8)

_DTYPES: dict[str, torch.dtype] = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Cuda": torch.float32,
    "Half": torch.float16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
}
_DATA_CLASS = re.compile(rf"torch\.({'|'.join(_DTYPES)})(Tensor|Storage)")
_NUMPY: dict[torch.dtype, str] = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int16: "<i2",
    torch.int8: "<i1",
    torch.uint8: "<u1",
}

_XZ, _GZIP = b"\xfd7zXZ\x00", b"\x1f\x8b"


class Torch7FileError(ValueError):
    """The file cannot be read, is no Torch7 file, is damaged, or holds what is not supported."""


class _Bad(Exception):
    """What is wrong, without the file's name."""


@dataclass(eq=False, repr=False)
class Torch7Object:
    """An object of a class of Torch7 or its packages, such as ``nn.Linear``.

    Attributes:
        class_name: as registered with Torch7.
        fields: its Lua table.
    """

    class_name: str
    fields: dict[Any, Any]

    def __repr__(self) -> str:
        return f"Torch7Object({self.class_name!r}, fields {', '.join(map(str, self.fields))})"


class _Reader:
    """Reads one object, in the binary format; :class:`_AsciiReader` reads the other."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0
        self.objects = 0
        self.memo: dict[int, Any] = {}
        self.unfinished: set[int] = set()
        self.cyclic: set[int] = set()
        self.storages: set[int] = set()

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self.position + count
        if end > len(self.content):
            raise _Bad(
                f"is truncated at byte {len(self.content)}: {count} bytes were to follow "
                f"from byte {self.position}"
            )
        piece = self.content[self.position : end]
        self.position = end
        return piece

    def bad(self, what: str) -> _Bad:
        return _Bad(f"is damaged before byte {self.position}: {what}")

    def array(self, dtype: torch.dtype, count: int) -> np.ndarray:
        """``count`` numbers, a copy of its own."""
        code = np.dtype(_NUMPY[dtype])
        return np.frombuffer(self.take(count * code.itemsize), code).astype(code.newbyteorder("="))

    def chars(self, count: int) -> bytes:
        return self.take(count)

    def integer(self) -> int:
        return struct.unpack("<i", self.take(4))[0]

    def double(self) -> float:
        return struct.unpack("<d", self.take(8))[0]

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
            raise _Bad(f"is damaged: its object ends at byte {self.position}, {rest} more follow")
        return result

    def object(self, depth: int) -> Any:
        """The next object of any type."""
        self.objects += 1
        if self.objects > _MAX_OBJECTS:
            raise _Bad(f"holds more than {_MAX_OBJECTS:,} objects")
        if depth > _MAX_DEPTH:
            raise _Bad(f"is nested deeper than {_MAX_DEPTH} levels at byte {self.position}")
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
            raise _Bad(
                f"holds a Lua function before byte {self.position}: compiled code is never loaded"
            )
        if kind not in (_TABLE, _TORCH):
            raise self.bad(f"there is no type of objects {kind}")
        index = self.integer()
        if index in self.memo:
            if index in self.unfinished:
                self.cyclic.add(index)
            return self.memo[index]
        return (self.table if kind == _TABLE else self.torch_object)(index, depth + 1)

    def table(self, index: int, depth: int) -> Any:
        entries: dict[Any, Any] = {}
        self.memo[index] = entries
        self.unfinished.add(index)
        for _ in range(self.count("a table's size")):
            key = self.object(depth)
            if not isinstance(key, (str, int, float)) or key != key:
                raise self.bad(f"a table's key is of type {type(key).__name__}")
            if key in entries:
                raise self.bad(f"a table has the key {key!r} twice")
            entries[key] = self.object(depth)
        self.unfinished.discard(index)
        # A table that contains itself is known by its dict already, so that it stays one.
        listed = all(type(key) is int and 1 <= key <= len(entries) for key in entries)
        if entries and listed and index not in self.cyclic:
            self.memo[index] = [entries[i] for i in range(1, len(entries) + 1)]
        return self.memo[index]

    def torch_object(self, index: int, depth: int) -> Any:
        name = self.string()
        if re.fullmatch(r"V \d+", name):  # without it, a file of Torch7's early days
            name = self.string()
        if not re.fullmatch(r"[A-Za-z_][\w.]{0,200}", name, re.ASCII):
            raise self.bad(f"a class has the name {name[:40]!r}")
        if data := _DATA_CLASS.fullmatch(name):
            dtype = _DTYPES[data[1]]
            if data[2] == "Storage":
                self.memo[index] = self.storage(dtype)
            else:
                self.memo[index] = self.tensor(name, dtype, depth)
            return self.memo[index]
        result = self.memo[index] = Torch7Object(name, {})
        fields = self.object(depth)
        if isinstance(fields, list):
            fields = dict(enumerate(fields, 1))
        if not isinstance(fields, dict):
            raise _Bad(
                f"holds an object of the class {name}, which is stored in a way of its own "
                f"(before byte {self.position})"
            )
        result.fields = fields
        return result

    def longs(self, count: int) -> list[int]:
        return self.array(torch.int64, count).tolist()

    def storage(self, dtype: torch.dtype) -> Tensor:
        size = self.longs(1)[0]
        if size < 0:
            raise self.bad(f"a storage's size is {size}")
        storage = torch.from_numpy(self.array(dtype, size))
        self.storages.add(id(storage))
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
        if id(storage) not in self.storages or storage.dtype != dtype:
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


class _AsciiReader(_Reader):
    """Numbers as text, separated by spaces and line ends; bytes and strings as they are."""

    _TOKEN = re.compile(rb"[ \t\r\n]*([-+.0-9A-Za-z]{1,40})(?![-+.0-9A-Za-z])")

    def array(self, dtype: torch.dtype, count: int) -> np.ndarray:
        if dtype in (torch.uint8, torch.int8):
            raw = np.frombuffer(self.chars(count), np.dtype(_NUMPY[dtype]))
            return raw.copy()
        if 2 * count - 1 > len(self.content) - self.position:
            raise _Bad(
                f"is truncated at byte {len(self.content)}: {count} numbers were to follow "
                f"from byte {self.position}"
            )
        convert: Callable[[bytes], int | float] = float if dtype.is_floating_point else int
        values = [self._token(convert) for _ in range(count)]
        self._end_of_line(count)
        try:
            return np.array(values, np.dtype(_NUMPY[dtype]).newbyteorder("="))
        except OverflowError:
            raise self.bad("a number is too large for its type") from None

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
                raise _Bad(f"is truncated at byte {len(self.content)}: a number was to follow")
            raise self.bad("a number is missing")
        self.position = token.end()
        try:
            return convert(token[1])
        except ValueError:
            raise self.bad(f"{token[1]!r} is no number") from None

    def chars(self, count: int) -> bytes:
        piece = self.take(count)
        self._end_of_line(count)
        return piece

    def _end_of_line(self, count: int) -> None:
        if count and self.content[self.position : self.position + 1] == b"\n":
            self.position += 1


def _is_ascii(content: bytes) -> bool:
    return re.match(rb"[0-8][ \n]", content) is not None


def is_torch7(content: bytes) -> bool:
    """Whether a file that begins with ``content``, six bytes at least, may be of Torch7.

    True also for what is packed with xz or gzip, whatever is inside.
    """
    packed = content.startswith((_XZ, _GZIP))
    binary = content[1:4] == b"\0\0\0" and content[0] <= max(_FUNCTIONS)
    return packed or binary or _is_ascii(content)


def _unpack_xz(packed: bytes, limit: int) -> bytes:
    pieces, total = [], 0
    while packed:
        # The format's largest dictionary is 4 GiB; xz -9 takes 64 MiB.
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**28)
        pieces.append(stream.decompress(packed, limit + 1 - total))
        total += len(pieces[-1])
        if total > limit:
            break
        if not stream.eof:
            raise EOFError("the packed data ends before its end mark")
        packed = stream.unused_data.lstrip(b"\0")
    return b"".join(pieces)


def _read(file: str | os.PathLike[str] | BinaryIO, max_bytes: int) -> tuple[str, bytes]:
    """The file's name and its unpacked content."""
    try:
        if isinstance(file, (str, os.PathLike)):
            name, path = os.fspath(file), Path(file)
            if not path.is_file():
                state = "is not a file" if path.exists() else "does not exist"
                raise Torch7FileError(f"{name} {state}")
            with open(path, "rb") as opened:
                content = opened.read(max_bytes + 1)
        else:
            name = str(getattr(file, "name", "<file>"))
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise Torch7FileError(f"{name} cannot be read: {error.strerror}") from None
    try:
        if len(content) <= max_bytes:
            if content.startswith(_XZ):
                content = _unpack_xz(content, max_bytes)
            elif content.startswith(_GZIP):
                with gzip.open(io.BytesIO(content)) as unpacked:
                    content = unpacked.read(max_bytes + 1)
    except EOFError:
        raise Torch7FileError(f"{name} is truncated: its packed data has no end") from None
    except (lzma.LZMAError, OSError, zlib.error) as error:
        raise Torch7FileError(f"{name} is damaged: it cannot be unpacked ({error})") from None
    if len(content) > max_bytes:
        raise Torch7FileError(f"{name} is larger than {max_bytes:,} bytes when unpacked")
    return name, content


def _parse(name: str, content: bytes) -> Any:
    try:
        if not content:
            raise _Bad("is empty")
        if not is_torch7(content) or content.startswith((_XZ, _GZIP)):
            raise _Bad(f"is not a Torch7 file: it begins with {content[:8]!r}")
        reader = _AsciiReader(content) if _is_ascii(content) else _Reader(content)
        return reader.whole()
    except _Bad as bad:
        raise Torch7FileError(f"{name} {bad}") from None


def load(file: str | os.PathLike[str] | BinaryIO, max_bytes: int = MAX_BYTES) -> Any:
    r"""The object that ``torch.save`` wrote, as plain Python objects.

    Numbers become int where they are whole, else float; strings str (bytes that are no UTF-8 as
    surrogates); tables lists where their keys are 1 to n with n >= 1, else dicts; tensors and
    storages tensors of the same dtype (``torch.CudaTensor``: float32), which share memory where
    they did; everything else is a :class:`Torch7Object`. What occurs twice is one object.

    Args:
        file: a path, or a file opened for reading bytes. Packed or not is told by its content.
        max_bytes: a larger file, unpacked, is refused.

    Raises:
        Torch7FileError: if the file is missing, too large, truncated, damaged or something else, or
            if it holds a Lua function, an object stored in a way of its class's own, more than a
            million objects, or more than 100 levels of them.

    Source: Torch7's ``File.lua`` and ``DiskFile``, February 2016.

    Example::

        >>> import io
        >>> load(io.BytesIO(b"3\n1\n1\n2\n1\nx\n1\n0.5\n"))
        {'x': 0.5}
    """
    return _parse(*_read(file, max_bytes))


class _Layer:
    """A layer of the file with checked access to its fields."""

    def __init__(self, source: Any, path: str, network: _Network) -> None:
        #: ``"3.1"``: the first layer of the third.
        self.path = path
        self.where = f"layer {path}" if path else "its object"
        if not isinstance(source, Torch7Object):
            raise _Bad(f"{self.where} is no layer but {_short(source)}")
        self.source = source
        self.network = network

    def bad(self, what: str) -> _Bad:
        return _Bad(f"{self.where} ({self.source.class_name}): {what}")

    def number(self, field: str, default: float | None = None) -> float:
        value = self.source.fields.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.bad(f"{field} must be a number, got {_short(value)}")
        return value

    def whole(self, field: str, least: int, default: int | None = None) -> int:
        value = self.number(field, default)
        if not isinstance(value, int) or not least <= value < 2**31:
            raise self.bad(f"{field} must be a whole number >= {least}, got {value}")
        return value

    def pair(self, field: str, least: int, default: int | None = None) -> tuple[int, int]:
        """Height, then width, as torch has them: kW and kH for ``"k?"``."""
        height, width = (
            self.whole(field.replace("?", side), least, default) for side in ("H", "W")
        )
        return height, width

    def flag(self, field: str, default: bool) -> bool:
        value = self.source.fields.get(field, default)
        if not isinstance(value, bool):
            raise self.bad(f"{field} must be true or false, got {_short(value)}")
        return value

    def tensor(self, field: str) -> Tensor:
        value = self.source.fields.get(field)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
            raise self.bad(f"{field} must be a floating point tensor, got {_short(value)}")
        # An expanded tensor of a few bytes could ask for any amount of memory here, and a thousand
        # layers could each copy the same large one.
        self.network.budget -= value.numel() * value.element_size()
        if self.network.budget < 0:
            raise self.bad(f"the layers' tensors are {_MAX_SHARING} times larger than the file")
        return value

    def sizes(self) -> list[int]:
        value = self.source.fields.get("size")
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
            raise self.bad(f"size must be a torch.LongStorage, got {_short(value)}")
        sizes = value[: _MAX_DIMENSIONS + 1].tolist()
        if len(sizes) > 1 and sizes[0] == -1:
            del sizes[0]  # the batch
        whole = [size for size in sizes if size != -1]
        if not 1 <= len(sizes) <= _MAX_DIMENSIONS or len(sizes) - len(whole) > 1:
            raise self.bad(f"cannot make the size {sizes[:8]}")
        if any(not 1 <= size < 2**31 for size in whole):
            raise self.bad(f"cannot make the size {sizes[:8]}")
        return sizes

    def modules(self) -> list[_Layer]:
        children = self.source.fields.get("modules")
        if children == {}:
            return []
        if not isinstance(children, list):
            raise self.bad(f"modules must be a list of layers, got {_short(children)}")
        prefix = f"{self.path}." if self.path else ""
        return [_Layer(child, f"{prefix}{i}", self.network) for i, child in enumerate(children, 1)]


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, (dict, list)):
        return "a table"
    return "nothing" if value is None else repr(value)[:60]


class _Network:
    """Turns layers of the file into modules."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.seen: set[int] = set()

    def build(self, layer: _Layer) -> nn.Module:
        make = _LAYERS.get(layer.source.class_name)
        if make is None:
            raise _Bad(
                f"{layer.where} is of the class {layer.source.class_name}, "
                f"which is not supported; supported are {', '.join(sorted(_LAYERS))}"
            )
        # Also what ends a network that contains itself.
        if id(layer.source) in self.seen:
            raise layer.bad("it occurs twice in the network")
        self.seen.add(id(layer.source))
        try:
            return make(layer)
        except (RuntimeError, ValueError, TypeError) as error:
            raise layer.bad(str(error).splitlines()[0]) from None


def _sequential(layer: _Layer) -> nn.Module:
    return nn.Sequential(*(layer.network.build(child) for child in layer.modules()))


def _set(
    layer: _Layer, module: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None
) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(weight.reshape(module.weight.shape))
        if bias is not None:
            if bias.shape != (len(weight),):
                raise layer.bad(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
            assert module.bias is not None
            module.bias.copy_(bias)
    return module


def _bias(layer: _Layer) -> Tensor | None:
    return None if layer.source.fields.get("bias") is None else layer.tensor("bias")


def _convolution(layer: _Layer) -> nn.Module:
    kernel, stride = layer.pair("k?", 1), layer.pair("d?", 1, 1)
    padding = layer.pair("pad?", 0, layer.whole("padding", 0, 0))
    inputs, outputs = layer.whole("nInputPlane", 1), layer.whole("nOutputPlane", 1)
    weight, bias = layer.tensor("weight"), _bias(layer)
    flat, full = (outputs, inputs * math.prod(kernel)), (outputs, inputs, *kernel)
    if weight.shape not in (flat, full):
        raise layer.bad(f"weight must have shape {flat} or {full}, got {tuple(weight.shape)}")
    if any(pad >= taps for pad, taps in zip(padding, kernel, strict=True)):
        raise layer.bad(f"the padding {padding} is not smaller than the kernel {kernel}")
    module = skip_init(
        nn.Conv2d,
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        bias=bias is not None,
        dtype=weight.dtype,
    )
    return _set(layer, module, weight, bias)


def _linear(layer: _Layer) -> nn.Module:
    weight, bias = layer.tensor("weight"), _bias(layer)
    if weight.dim() != 2:
        raise layer.bad(f"weight must have two dimensions, got shape {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    module = skip_init(nn.Linear, inputs, outputs, bias=bias is not None, dtype=weight.dtype)
    return _set(layer, module, weight, bias)


def _windows(layer: _Layer) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool]:
    kernel = layer.pair("k?", 1)
    padding = layer.pair("pad?", 0, 0)
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise layer.bad(f"the padding {padding} is more than half of the window {kernel}")
    return kernel, layer.pair("d?", 1), padding, layer.flag("ceil_mode", False)


def _average_pooling(layer: _Layer) -> nn.Module:
    divisor = None if layer.flag("divide", True) else 1
    return nn.AvgPool2d(*_windows(layer), layer.flag("count_include_pad", True), divisor)


def _lp_pooling(layer: _Layer) -> nn.Module:
    """Torch7 makes it of four layers: power, mean, times the window's size, root."""
    parts = layer.modules()
    names = [part.source.class_name.removeprefix("nn.") for part in parts]
    if names == ["Square", "SpatialAveragePooling", "MulConstant", "Sqrt"]:
        norm_type = 2.0
    elif names == ["Power", "SpatialAveragePooling", "MulConstant", "Power"]:
        norm_type = parts[0].number("pow")
        if not math.isclose(norm_type * parts[3].number("pow"), 1.0):
            raise layer.bad("its second power is not the inverse of the first")
    else:
        raise layer.bad(f"it is made of {', '.join(names) or 'nothing'}")
    kernel, stride, padding, ceil_mode = _windows(parts[1])
    if not parts[1].flag("divide", True) or parts[2].number("constant_scalar") != math.prod(kernel):
        raise layer.bad("its sum is not that over a window")
    if padding != (0, 0) or ceil_mode:
        # Its mean counts the padding; whether LPPool2d agrees there was never measured.
        raise layer.bad("padding and ceil_mode are not supported")
    return ops_nn.LPPool2d(norm_type, kernel, stride)


def _relu(layer: _Layer) -> nn.Module:
    if layer.number("threshold", 0) != 0 or layer.number("val", 0) != 0:
        raise layer.bad("threshold and val must be 0")
    return nn.ReLU()


def _dropout(layer: _Layer) -> nn.Module:
    p = layer.number("p")
    if not 0 <= p < 1:
        raise layer.bad(f"p must be in [0, 1), got {p}")
    if not layer.flag("v2", False) and p > 0:
        raise layer.bad("its first version, which scales when it predicts, is not supported")
    return nn.Dropout(p)


def _reshape(layer: _Layer) -> nn.Module:
    sizes = layer.sizes()
    if len(sizes) == 1:
        return nn.Flatten()
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, sizes))


def _divisive(layer: _Layer) -> nn.Module:
    threshold = layer.number("threshold", 1e-4)
    return ops_nn.DivisiveNorm2d(
        layer.tensor("kernel"), threshold, layer.number("thresval", threshold)
    )


_LAYERS: dict[str, Callable[[_Layer], nn.Module]] = {
    "nn.Dropout": _dropout,
    "nn.Identity": lambda layer: nn.Identity(),
    "nn.Linear": _linear,
    "nn.LogSoftMax": lambda layer: torch7.LogSoftmax(),
    "nn.ReLU": _relu,
    "nn.Reshape": _reshape,
    "nn.Sequential": _sequential,
    "nn.Sigmoid": lambda layer: ops_nn.Sigmoid(),
    "nn.SoftMax": lambda layer: ops_nn.Softmax(dim=1),
    "nn.SpatialAveragePooling": _average_pooling,
    "nn.SpatialConvolution": _convolution,
    "nn.SpatialConvolutionMM": _convolution,
    "nn.SpatialDivisiveNormalization": _divisive,
    "nn.SpatialLPPooling": _lp_pooling,
    "nn.SpatialMaxPooling": lambda layer: nn.MaxPool2d(
        *_windows(layer)[:3], ceil_mode=layer.flag("ceil_mode", False)
    ),
    "nn.SpatialSubtractiveNormalization": lambda layer: ops_nn.SubtractiveNorm2d(
        layer.tensor("kernel")
    ),
    "nn.Tanh": lambda layer: nn.Tanh(),
    "nn.View": _reshape,
}


def load_net(file: str | os.PathLike[str] | BinaryIO, max_bytes: int = MAX_BYTES) -> nn.Sequential:
    """The network in a file of Torch7, as a module in evaluation mode, for batches.

    Supported are ``nn.Sequential``, nested or not, ``SpatialConvolution`` and
    ``SpatialConvolutionMM``, ``Linear``, ``Tanh``, ``ReLU``, ``Sigmoid``, ``SpatialLPPooling``,
    ``SpatialMaxPooling``, ``SpatialAveragePooling``, ``SpatialSubtractiveNormalization``,
    ``SpatialDivisiveNormalization``, ``Reshape`` and ``View`` of one sample's values, ``Dropout``
    (its second version), ``LogSoftMax`` (:class:`mnist_ops.torch7.LogSoftmax`, with Torch7's
    approximate exponential), ``SoftMax`` and ``Identity``. The parameters keep their dtype:
    float64 for a ``torch.DoubleTensor``, float32 for a ``torch.FloatTensor`` or
    ``torch.CudaTensor``. Gradients and outputs that the file may hold are left out.

    Args:
        file: as for :func:`load`.
        max_bytes: as for :func:`load`.

    Raises:
        Torch7FileError: as for :func:`load`; if the object is no network; if a layer is of another
            class or its fields do not fit together. The message names the file and the layer,
            counted from 1 as in Torch7.

    Example::

        >>> model = load_net("model.net")
        >>> training.evaluate(model, digits.test_images, digits.test_labels)
    """
    name, content = _read(file, max_bytes)
    root = _parse(name, content)
    try:
        network = _Network(_MAX_SHARING * len(content))
        module = network.build(_Layer(root, "", network))
        dtypes = {str(parameter.dtype) for parameter in module.parameters()}
        if len(dtypes) > 1:
            raise _Bad(f"its layers have several dtypes: {', '.join(sorted(dtypes))}")
    except _Bad as bad:
        raise Torch7FileError(f"{name}: {bad}") from None
    if not isinstance(module, nn.Sequential):
        module = nn.Sequential(module)
    return module.eval()
