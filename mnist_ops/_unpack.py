"""Files packed with gzip or xz, unpacked in pieces and never beyond a limit."""

from __future__ import annotations

import contextlib
import lzma
import os
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from typing import Any, BinaryIO

__all__ = [
    "LZMAError",
    "TooLargeError",
    "beginning",
    "is_packed",
    "limit_of",
    "pieces",
    "read",
    "unpack",
]

XZ, GZIP = b"\xfd7zXZ\x00", b"\x1f\x8b"

_PIECE = 2**20
# What follows a packed file is handed back and copied: not too much at a time.
_FEED = 2**14
# Numbers pack 1.1 to 5 times, a network with its zeroed gradients some 10 times; zeros alone pack
# 1,000 times (gzip) or 7,000 times (xz), and that is what a file made to fill the memory holds.
_LARGEST_RATIO = 100
_ALWAYS_ALLOWED = 2**24
# What xz -9 needs to unpack is 65 MiB; the format allows 4 GiB.
_XZ_MEMORY = 2**27


class TooLargeError(Exception):
    """The file is larger than the limit."""


def is_packed(content: bytes | bytearray) -> bool:
    """Whether a file that begins with ``content`` is packed with gzip or xz."""
    return content.startswith((XZ, GZIP))


def limit_of(packed: int, largest: int) -> int:
    """The size to which ``packed`` bytes may unpack: ``largest``, and 100 times their own.

    16 MiB are always allowed.
    """
    return min(largest, max(_ALWAYS_ALLOWED, _LARGEST_RATIO * packed))


def read(file: BinaryIO, limit: int) -> bytearray:
    """The rest of an opened file.

    Raises:
        TooLargeError: if it is longer than ``limit``; no more than that is ever held.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not every file has a number
        if os.fstat(file.fileno()).st_size - file.tell() > limit:
            raise TooLargeError
    content = bytearray()
    while piece := file.read(min(_PIECE, limit + 1 - len(content))):
        content += piece
        if len(content) > limit:
            raise TooLargeError
    return content


def pieces(packed: bytes | bytearray) -> Iterator[bytes]:
    """What ``packed``, one gzip or xz file or several joined, unpacks to, at most 1 MiB at a time.

    Raises:
        EOFError: if the packed data ends before its end mark.
        zlib.error, lzma.LZMAError: if it is damaged.
    """
    is_gzip = packed.startswith(GZIP)
    rest = memoryview(packed)
    while len(rest):
        if rest[0] == 0:  # zeros may follow to fill a block
            piece = bytes(rest[:_FEED])
            rest = rest[len(piece) - len(piece.lstrip(b"\0")) :]
            continue
        stream: Any = (
            zlib.decompressobj(zlib.MAX_WBITS | 16)
            if is_gzip
            else lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        )
        while not stream.eof:
            data = stream.unconsumed_tail if is_gzip else b""
            if not data and (is_gzip or stream.needs_input):
                data, rest = bytes(rest[:_FEED]), rest[_FEED:]
            piece = stream.decompress(data, _PIECE)
            if not piece and not data and not stream.eof:
                raise EOFError("the packed data ends before its end mark")
            yield piece
        rest = memoryview(packed)[len(packed) - len(rest) - len(stream.unused_data) :]


def unpack(packed: bytes | bytearray, limit: int) -> bytearray:
    """All that ``packed`` unpacks to, see :func:`pieces`.

    Raises:
        TooLargeError: if that is longer than ``limit``; no more than that is ever held.
    """
    content = bytearray()
    for piece in pieces(packed):
        content += piece
        if len(content) > limit:
            raise TooLargeError
    return content


def beginning(packed: bytes | bytearray, size: int) -> bytearray:
    """The first ``size`` bytes of what ``packed`` unpacks to, or all there are."""
    content = bytearray()
    for piece in pieces(packed):
        content += piece
        if len(content) >= size:
            break
    del content[size:]
    return content
