"""Files that can be relied on: written whole or not at all, checked before use, by one at a time.

``training`` hands these on; they are here so that every module that keeps files can use them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

#: Within a folder that :func:`locked` holds.
LOCK = ".lock"

_PART = re.compile(r"\..+\.\d+-\d+\.part")
_END_OF_ZIP = 22  # bytes of the last record of a zip file without a comment


class DamagedFileError(ValueError):
    """A file does not hold what was written to it, or is none of its kind; the message says why."""


class FolderInUseError(RuntimeError):
    """Another process, or another thread of this one, writes to the folder."""


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None
) -> None:
    """Write a file so that ``path`` is always the whole old or the whole new one.

    Args:
        path: the file; its folder must exist. Where it is a symbolic link, what it leads to is
            replaced. A device or a pipe cannot be replaced: it is written to as it is.
        write: is given the opened file.
        keep: what the old file is called afterwards; unless given it is lost. For a moment there
            may then be no ``path``, but always one of the two.

    Raises:
        OSError: if the file cannot be written, a full disk for instance; it names ``path``.
    """
    part = None
    try:
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                write(file)
            return
        target = Path(os.path.realpath(path))
        # In the same folder, as a rename is atomic within one file system only.
        name = f".{target.name}.{os.getpid()}-{threading.get_native_id()}.part"
        part = target.with_name(name)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a power cut leaves a whole file, too
        if keep is not None and target.exists():
            shutil.move(target, keep)
        os.replace(part, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to a file as UTF-8 with :func:`write_atomically`."""
    # Names of files that are not UTF-8 are within Python's texts as surrogates: their own bytes.
    content = text.encode("utf-8", "surrogateescape")
    write_atomically(Path(path), lambda file: file.write(content))


def write_torch(path: str | os.PathLike[str], value: Any, keep: Path | None = None) -> None:
    """Write ``value`` with :func:`torch.save`, so that :func:`read_torch` can check it.

    ``keep`` is that of :func:`write_atomically`.
    """
    serialization = torch.serialization
    checksums = serialization.get_crc32_options()
    serialization.set_crc32_options(True)
    # Through memory: on a full disk torch.save itself raises RuntimeErrors, and may do so twice.
    content = io.BytesIO()
    try:
        torch.save(value, content)
    finally:
        serialization.set_crc32_options(checksums)
    write_atomically(Path(path), lambda file: file.write(content.getbuffer()), keep=keep)


def read_torch(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`torch.save` wrote, onto the CPU, after every byte of it has been checked.

    ``torch.load`` does not compare the checksums (CRC-32) that a file holds: one flipped bit of a
    weight goes unnoticed. Here every record is compared first. Nothing but data is ever unpickled,
    and nothing that takes much more memory than the file has bytes: no packed records, no records
    that overlap, no tensors that are larger than what is stored of them.

    Raises:
        DamagedFileError: if the file is damaged or something else.
        OSError: if it cannot be opened.
    """
    damaged = f"{path} is damaged or not a file of torch.save"
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            content = _checked_records(file, size)
            value = torch.load(content, map_location="cpu", weights_only=True)
            _check_tensors(value, size)
        except DamagedFileError as error:
            raise DamagedFileError(f"{damaged}: {error}") from None
        except Exception:  # whatever the bytes make the readers stumble over
            raise DamagedFileError(damaged) from None
    return value


def _checked_records(file: BinaryIO, size: int) -> io.BytesIO:
    """A zip file of the same records, each compared with its checksum.

    A new one, because PyTorch finds a record by other fields of the file than the zipfile module
    does: a flipped bit between the records can make it read other bytes than those that were
    compared.
    """
    file.seek(max(0, size - _END_OF_ZIP))
    end = file.read()
    if not (end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0")):
        raise DamagedFileError("its end is missing")
    checked = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(checked, "w") as copy:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise DamagedFileError("its records are compressed")
        if sum(record.file_size for record in records) > size:
            raise DamagedFileError("its records are larger than the file")
        if len({record.filename for record in records}) < len(records):
            raise DamagedFileError("two of its records have one name")
        for record in records:
            try:
                with (
                    archive.open(record) as source,
                    copy.open(record.filename, "w", force_zip64=True) as target,
                ):
                    shutil.copyfileobj(source, target)  # the checksum is compared at its end
            except (zipfile.BadZipFile, EOFError):
                raise DamagedFileError(
                    f"its record {record.filename} is not what was written"
                ) from None
    checked.seek(0)
    return checked


def _check_tensors(value: Any, size: int) -> None:
    """Refuse tensors that take more memory once they are copied than the whole file."""
    left, seen = [value], set()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            plain = type(one) in (Tensor, nn.Parameter) and one.layout == torch.strided
            if not plain or one.device.type != "cpu" or one.is_quantized or one.nbytes > size:
                raise DamagedFileError(f"a tensor of shape {tuple(one.shape)} is not in it as such")
        elif isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set)):
            left += one


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep everyone else out of a folder, which is made if need be; sweep what a killed run left.

    However this process ends, the lock goes with it. The same thread may lock a folder again
    within. An empty file ``.lock`` stays.

    Raises:
        FolderInUseError: at once, if another process or thread is at work there.
        OSError: if the folder cannot be made or written to.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # One lock object for each path, so that a thread that has it can lock it again.
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(f"another process is at work in {folder}") from None
    try:
        if lock.lock_counter == 1:
            for path in folder.iterdir():
                if _PART.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
