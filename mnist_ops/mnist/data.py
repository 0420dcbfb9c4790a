"""MNIST: the shipped files, a folder of the user's own, and the reports' preprocessing.

The four official files are package data, read where they lie and checked against their published
MD5 sums. ::

    >>> from mnist_ops.mnist import data
    >>> images, labels = data.load("train")
    >>> images.shape, images.dtype
    (torch.Size([60000, 1, 28, 28]), torch.uint8)
    >>> data.prepare("contrastive").train_images.shape       # what report 1 trains on
    torch.Size([60000, 1, 32, 32])
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _unpack as packing
from ..ops import contrastive_norm2d, gaussian1d
from ..ops._common import check_integer, check_number

__all__ = [
    "DataError",
    "Splits",
    "describe",
    "global_norm",
    "global_statistics",
    "load",
    "local_norm",
    "pad32",
    "prepare",
]


class _File(NamedTuple):
    """An official file: its name without ``.gz`` and MD5 sums."""

    name: str
    gz_md5: str
    raw_md5: str


FILES = (
    _File(
        "train-images-idx3-ubyte",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "6bbc9ace898e44ae57da46a324031adb",
    ),
    _File(
        "train-labels-idx1-ubyte",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "a25bea736e30d166cdddb491f175f624",
    ),
    _File(
        "t10k-images-idx3-ubyte",
        "9fb629c4189551a2d022fa330f9573f3",
        "2646ac647ad5339dbf082846283269ea",
    ),
    _File(
        "t10k-labels-idx1-ubyte",
        "ec29112dd5afa0611ce80d1b7f02629c",
        "27ae3e4e09519cfbb04c329615203637",
    ),
)

_PREFIX = {"train": "train", "test": "t10k"}
#: How many digits each split has.
COUNTS = {"train": 60_000, "test": 10_000}
# An unpacked file may have so many bytes: 1.3 million digits. gzip makes a thousand of one.
_MOST_BYTES = 1 << 30
_REINSTALL = "Reinstall mnist_ops, or name a folder of your own that holds the four MNIST files."


class DataError(RuntimeError):
    """A data file or folder is missing or damaged; the message says which."""


def _shipped() -> Path:
    """The folder of the shipped files."""
    return Path(__file__).parent


def _read_shipped(file: _File) -> Tensor:
    """The entries of a shipped file, checked against its published MD5 sum."""
    path = _shipped() / f"{file.name}.gz"
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. {_REINSTALL}") from None
    digest = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    if digest != file.gz_md5:
        raise DataError(
            f"{path} was altered: expected MD5 {file.gz_md5}, got {digest}. {_REINSTALL}"
        )
    return read_idx(path, "images" in file.name, file=io.BytesIO(packed))


def _in(folder: Path) -> dict[str, Path]:
    """The most of the four files that a folder holds of one set, under any name that they have."""
    most: dict[str, Path] = {}
    # EMNIST's: its two sets of ten digits.
    for prefix in ("", "emnist-mnist-", "emnist-digits-"):
        found = {}
        for file in FILES:
            name = prefix + (file.name.replace("t10k", "test") if prefix else file.name)
            spellings = (name, f"{name}.gz", name.replace("-idx", ".idx"))
            for spelling in (*spellings, f"{spellings[-1]}.gz"):
                if (folder / spelling).is_file():
                    found[file.name] = folder / spelling
                    break
        if len(found) > len(most):
            most = found
    return most


def _find(root: Path) -> dict[str, Path]:
    """The four files of a folder, flat or in torchvision's layout; all must be there."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder.")
    places = [root, root / "MNIST" / "raw", root / "raw"]
    found = max(map(_in, places), key=len)
    if not found:
        others = {name: _in(root / name / "raw") for name in ("FashionMNIST", "KMNIST", "EMNIST")}
        others = {name: files for name, files in others.items() if files}
        if len(others) > 1:
            raise DataError(f"{root} holds {' and '.join(others)}: name the folder of one.")
        found = next(iter(others.values()), {})
    for file in FILES:
        if file.name not in found:
            wanted = ", ".join(file.name for file in FILES)
            raise DataError(
                f"{file.name} is missing: {root} holds neither it nor {file.name}.gz. A data "
                f"folder holds {wanted}, each as it is or with .gz, directly or in MNIST/raw."
            )
    return found


def _announced(path: Path, header: bytes | bytearray, images: bool) -> list[int]:
    """The shape that an idx file's header announces, checked."""
    dims = 3 if images else 1
    if len(header) < 4 * (dims + 1):
        raise DataError(f"{path} is truncated: {len(header)} bytes, not even a whole idx header.")
    magic, *shape = struct.unpack_from(f">{dims + 1}I", header)
    expected = 0x0803 if images else 0x0801
    if magic != expected:
        kind = "images" if images else "labels"
        raise DataError(
            f"{path} is not an idx file of {kind}: expected magic number {expected}, got {magic}."
        )
    if images and shape[1:] != [28, 28]:
        raise DataError(f"{path}: expected images of 28x28 pixels, got {shape[1]}x{shape[2]}.")
    if shape[0] == 0:
        raise DataError(f"{path} holds no entries.")
    return shape


def read_idx(path: Path, images: bool, wary: bool = False, file: BinaryIO | None = None) -> Tensor:
    """The entries of an idx file, uint8: ``(N, 1, 28, 28)`` or ``(N,)``.

    Args:
        path: the file, packed with gzip or xz or not. It is unpacked no further than its header
            announces, and that is 1 GiB at most.
        images: whether images are expected, or labels.
        wary: refuse more than 16 MiB that were packed more than a hundredfold, as files are that
            were made to fill the memory.
        file: the file at its beginning, where it is open already.

    Raises:
        DataError: if the file is missing, damaged, something else or too large.
    """
    size = 16 if images else 8
    try:
        with open(path, "rb") if file is None else contextlib.nullcontext(file) as source:
            content = bytearray(source.read(size))
            packed = packing.is_packed(content)
            if not packed:
                _announced(path, content, images)  # else it is not worth reading
            content += packing.read(source, _MOST_BYTES)
        header = packing.beginning(content, size) if packed else content[:size]
        shape = _announced(path, header, images)
        whole = size + math.prod(shape)
        if packed:
            most = packing.limit_of(len(content), _MOST_BYTES) if wary else _MOST_BYTES
            if whole > most:
                raise DataError(
                    f"{path} announces {whole} bytes, more than the {most} that are read."
                )
            content = packing.beginning(content, whole + 1)
    except packing.TooLargeError:
        raise DataError(f"{path} is larger than the {_MOST_BYTES} bytes that are read.") from None
    except (EOFError, packing.LZMAError, zlib.error) as error:
        state = "truncated" if isinstance(error, EOFError) else "damaged"
        raise DataError(f"{path} is {state}: {error}. Copy the file again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except MemoryError:
        raise DataError(f"{path} needs more memory than there is.") from None
    if len(content) != whole:
        state = "is truncated" if len(content) < whole else "is too long"
        raise DataError(f"{path} {state}: {len(content)} bytes where its header announces {whole}.")
    entries = torch.frombuffer(content, dtype=torch.uint8, offset=size)
    return entries.view(-1, 1, 28, 28) if images else entries


def _read_folder(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read a folder of the user's own."""
    paths = _find(root)
    images_path, labels_path = (
        paths[file.name] for file in FILES if file.name.startswith(_PREFIX[split])
    )
    labels = read_idx(labels_path, images=False)
    images = read_idx(images_path, images=True)
    if len(images) != len(labels):
        raise DataError(
            f"Images and labels do not match: {images_path} has {len(images)}, "
            f"{labels_path} has {len(labels)}."
        )
    if int(labels.max()) > 9:
        raise DataError(f"{labels_path}: labels must be 0 to 9, got {int(labels.max())}.")
    if images_path.name.startswith("emnist-"):
        images = images.mT.contiguous()  # its images lie on their side
    return images, labels.to(torch.int64)


def checksums(root: str | os.PathLike[str]) -> list[str]:
    """The MD5 sums of the four files of a folder, unpacked: those of :data:`FILES` for MNIST."""
    sums = []
    for split in _PREFIX:
        images, labels = load(split, root)
        for magic, values in ((0x803, images[:, 0]), (0x801, labels.to(torch.uint8))):
            header = struct.pack(f">{1 + values.dim()}I", magic, *values.shape)
            digest = hashlib.md5(header, usedforsecurity=False)
            digest.update(values.contiguous().numpy().data)
            sums.append(digest.hexdigest())
    return sums


def is_mnist(root: str | os.PathLike[str] | None) -> bool:
    """Whether :func:`load` reads the official digits; ``None``: what is shipped."""
    # What is shipped is checked when it is read.
    return root is None or checksums(root) == [file.raw_md5 for file in FILES]


def describe(root: str | os.PathLike[str] | None = None) -> str:
    """Say which data :func:`load` reads: it is MNIST where its bytes are, and only there.

    Args:
        root: as for :func:`load`.

    Returns:
        ``"MNIST"``, or where other files lie.

    Raises:
        DataError: as for :func:`load`.

    Example::

        >>> describe()
        'MNIST'
    """
    if root is None or is_mnist(root):
        return "MNIST"
    folder = _find(Path(root).expanduser())[FILES[0].name].parent
    return f"files that are not MNIST's, in {folder}"


def load(split: str, root: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor]:
    """The digits as they are: images ``(N, 1, 28, 28)`` uint8 and labels ``(N,)`` int64.

    Args:
        split: ``"train"`` (60,000 digits) or ``"test"`` (10,000).
        root: a folder of your own with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, each as it is, with ``.gz``,
            or spelled ``train-images.idx3-ubyte``; packed or not whatever the name says; directly
            in the folder or where torchvision puts them, in its ``MNIST/raw``, ``raw``,
            ``FashionMNIST/raw``, ``KMNIST/raw`` or ``EMNIST/raw`` (whose sets ``mnist`` and
            ``digits`` have ten classes; the images are turned upright). It may hold any data in
            this format; only its integrity is checked, and :func:`describe` says whose it is.
            Without it, the files that came with the package, checked against their MD5 sums.

    Raises:
        DataError: if a file is missing, truncated or altered.
    """
    if split not in _PREFIX:
        raise ValueError(f"load: split must be 'train' or 'test', got {split!r}")
    if root is not None:
        return _read_folder(Path(root).expanduser(), split)
    files = (file for file in FILES if file.name.startswith(_PREFIX[split]))
    images, labels = map(_read_shipped, files)
    return images, labels.to(torch.int64)


def pad32(images: Tensor) -> Tensor:
    """Zero-pad ``(..., 28, 28)`` to the reports' ``(..., 32, 32)``, two pixels on every side."""
    return F.pad(images, (2, 2, 2, 2))


def global_statistics(images: Tensor, padding: int = 2) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over all pixels of the zero-padded images.

    Args:
        images: uint8, ``(N, C, H, W)``, not yet padded.
        padding: pixels added on every side; 2 makes 28x28 into 32x32.

    Returns:
        Two floats. Sums run in integers, so they are exact to the last division: 25.5094 and
        70.1804 for the training set.

    Raises:
        TypeError: if the images are not uint8.
        ValueError: if there is no pixel, or all of them are equal and cannot be normalised.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"global_statistics: images must be uint8, got {images.dtype}")
    if images.dim() < 2 or images.numel() == 0:
        raise ValueError(
            f"global_statistics: images must hold one pixel at least, got {tuple(images.shape)}"
        )
    padding = check_integer("global_statistics", "padding", padding, 0)
    height, width = images.shape[-2:]
    count = (images.numel() // (height * width)) * (height + 2 * padding) * (width + 2 * padding)
    total = int(images.sum(dtype=torch.int64))
    squares = int(images.to(torch.int32).square_().sum(dtype=torch.int64))
    spread = squares * count - total**2
    if spread == 0:
        raise ValueError(
            "global_statistics: images must differ in some pixel, got a standard deviation of 0"
        )
    variance = spread / (count * (count - 1))
    return total / count, math.sqrt(variance)


def global_norm(images: Tensor, mean: float, std: float) -> Tensor:
    """``(x - mean) / std`` in float32, with mean and std rounded to float32 first.

    Raises:
        ValueError: if ``mean`` is not finite or ``std`` not finite and above 0, in float32.
    """
    for name, value, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        number = check_number("global_norm", name, value)
        rounded = float(torch.tensor(number, dtype=torch.float32, device="cpu"))
        if not (math.isfinite(rounded) and rounded > least):
            bound = "" if least else " and > 0"
            raise ValueError(f"global_norm: {name} must be finite{bound} in float32, got {value}")
    return images.to(torch.float32).sub_(mean).div_(std)


def local_norm(images: Tensor, kernel_size: int = 7) -> Tensor:
    """Report 1's local normalization: contrastive, a 1-D Gaussian kernel, threshold 1.

    Args:
        images: float32, ``(N, 1, H, W)``, after :func:`global_norm`.
        kernel_size: taps of the Gaussian (Table 3.2 compares 7, 15 and none).

    Returns:
        The same shape and dtype.
    """
    kernel = gaussian1d(kernel_size)
    # In pieces that stay in the processor's cache.
    pieces = [contrastive_norm2d(piece, kernel, 1.0, 1.0) for piece in images.split(256)]
    return torch.cat(pieces)


@dataclass(frozen=True)
class Splits:
    """Images ``(N, 1, 32, 32)`` float32 and labels ``(N,)`` int64, ready for training."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: float
    std: float


def prepare(
    normalization: str = "contrastive",
    kernel_size: int = 7,
    root: str | os.PathLike[str] | None = None,
    limit: int | tuple[int, int] | None = None,
    statistics_of: int | None = None,
    validation: int = 0,
) -> Splits:
    """The reports' data: zero-padded to 32x32 and normalised in float32.

    Args:
        normalization: ``"contrastive"``: global, then local (report 1); ``"global"``: global only
            (report 2, and report 1's "no normalization").
        kernel_size: taps of the local normalization's Gaussian.
        root: as for :func:`load`.
        limit: keep the first ``limit`` digits of each split, or of training and test set so many
            each.
        statistics_of: normalise with mean and standard deviation of so many of the training digits,
            the first ones, and not of all: with 6000 and ``limit=(6000, 1000)`` the small set of
            the course's scripts.
        validation: test on so many of the training digits, the last ones, and train on the others.

    Raises:
        ValueError: for an unknown normalization or a limit below 1.
        DataError: as for :func:`load`, and if all training images are black.
    """
    if normalization not in ("contrastive", "global"):
        raise ValueError(
            f"prepare: normalization must be 'contrastive' or 'global', got {normalization!r}"
        )
    limits = limit if isinstance(limit, tuple) else (limit, limit)
    if len(limits) != 2:
        raise ValueError(f"prepare: limit must be one number or two, got {limit!r}")
    first, first_test = (
        None if one is None else check_integer("prepare", "limit", one, 1) for one in limits
    )
    train_images, train_labels = load("train", root)
    if not validation:
        test_images, test_labels = load("test", root)
    try:
        mean, std = global_statistics(train_images[:statistics_of])
    except ValueError:
        raise DataError(
            f"{root}: all pixels of the training images are 0: they cannot be normalised."
        ) from None

    if validation:
        train_images, test_images = train_images[:-validation], train_images[-validation:]
        train_labels, test_labels = train_labels[:-validation], train_labels[-validation:]

    def finish(images: Tensor) -> Tensor:
        images = global_norm(pad32(images), mean, std)
        return local_norm(images, kernel_size) if normalization == "contrastive" else images

    return Splits(
        finish(train_images[:first]),
        train_labels[:first].clone(),
        finish(test_images[:first_test]),
        test_labels[:first_test].clone(),
        mean,
        std,
    )
