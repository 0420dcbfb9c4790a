"""Damaged files of every kind for the readers of networks and images, in a process with a limit.

    python tests/fuzz/fuzz_files.py [--files 20000] [--seed 0] [--processes 8]

Whatever the bytes are, a reader returns what is in the file or raises its own error, within a
second or so and 1 GiB of memory. The suite runs 400 of them (test_fuzz_files.py).
"""

from __future__ import annotations

import argparse
import gzip
import io
import lzma
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # torch7_writer, where run by hand

import numpy as np
import torch
from torch7_writer import every_kind, save

from mnist_ops import torch7, training
from mnist_ops.lab import prediction
from mnist_ops.mnist import data, models
from mnist_ops.torch7 import files as torch7_files

MEMORY = 2**30  # bytes more than the process has when it begins
SECONDS = 30  # for one file, on a busy machine


def networks() -> list[bytes]:
    """Files of Torch7 with a layer of every kind, of every machine."""
    files = []
    for value in every_kind():
        files += [save(value, order=o, long_size=n) for o in "<>" for n in (4, 8)]
        files.append(save(value, ascii=True))
    return [*files, gzip.compress(files[1]), lzma.compress(files[4])]


def archives() -> list[bytes]:
    """Checkpoints and images of torch.save."""
    model = models.convnet((2, 2, 4))
    state = {
        "format": 1, "epoch": 0, "model": model.state_dict(), "optimizer": {}, "generator": {},
        "settings": {"network": {"widths": (2, 2, 4)}, "normalization": "global", "mean": 1.0,
                     "std": 2.0},
        "torch_rng": torch.zeros(3), "cuda_rng": [], "history": [],
    }  # fmt: skip
    files = []
    for value in (state, model.state_dict(), torch.zeros(2, 28, 28, dtype=torch.uint8)):
        torch.save(value, buffer := io.BytesIO())
        files.append(buffer.getvalue())
    np.save(buffer := io.BytesIO(), np.zeros((2, 28, 28), np.uint8))
    idx = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28)) + bytes(1568)
    return [*files, buffer.getvalue(), idx, gzip.compress(idx)]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The file after one to eight changes, inside what it is packed with as often as outside."""
    for packer in (gzip, lzma):
        if content.startswith(packer.compress(b"")[:2]) and rng.random() < 0.5:
            return packer.compress(damaged(packer.decompress(content), rng))
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(result) + 1)
        kind = rng.choices(range(6), (4, 4, 4, 1, 1, 1))[0]
        if kind == 0 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(result):
            result[place] = rng.choice((0, 1, 3, 4, 7, 8, 0x7F, 0x80, 0xFF, 0x2D, 0x39))
        elif kind == 2:
            size = rng.choice((4, 8))
            number = rng.choice((-1, 0, 1, 2**31 - 1, 2**15, 2**62, -(2**62), 10**9))
            number = (number + 2 ** (8 * size - 1)) % 2 ** (8 * size) - 2 ** (8 * size - 1)
            order = rng.choice(("little", "big"))
            result[place : place + size] = number.to_bytes(size, order, signed=True)
        elif kind == 3:
            del result[place : place + rng.choice((1, 4, 8, 100))]
        elif kind == 4:
            other = rng.randrange(len(result) + 1)
            result[place:place] = result[other : other + rng.choice((4, 8, 40, 400))]
        else:
            del result[place:]
    return bytes(result)


def worker(count: int, seed: int) -> None:
    """Read damaged files until one of them does harm; print what came of them."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    readers = [torch7_files.load, torch7.load_net, prediction.load_model]
    kinds = [(networks(), readers), (archives(), [prediction.load_model, prediction.read_images])]
    own = torch7_files.Torch7FileError, training.CheckpointError, data.DataError
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        for number in range(count):
            sources, readers = kinds[number % 2]
            content = damaged(rng.choice(sources), rng)
            path.write_bytes(content)
            reader = rng.choice(readers)
            signal.alarm(SECONDS)
            try:
                reader(path)
                outcomes[f"{reader.__name__}: read"] += 1
            except own as error:
                outcomes[f"{reader.__name__}: {type(error).__name__}"] += 1
                if "\n" in str(error) or str(path) not in str(error):
                    raise AssertionError(f"seed {seed}, file {number}: {error}") from None
            except BaseException:
                print(f"seed {seed}, file {number}: {content[:200]!r}", file=sys.stderr)
                raise
            signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) >> 10
    for outcome, times in sorted(outcomes.items()):
        print(f"{outcome} {times}")
    print(f"MiB {grown}")


def run(count: int, seed: int = 0, processes: int = 1) -> Counter[str]:
    """``count`` files in so many processes; what came of them, and the most memory of one.

    Raises:
        AssertionError: if a process fails; with what it printed.
    """
    each = -(-count // processes)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", "--files", str(each), "--seed", str(seed + i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(processes)
    ]
    outcomes: Counter[str] = Counter()
    for process in started:
        output, errors = process.communicate()
        assert process.returncode == 0, f"exit code {process.returncode}: {errors[-3000:]}"
        for line in output.splitlines():
            name, times = line.rsplit(" ", 1)
            outcomes[name] = (
                max(outcomes[name], int(times)) if name == "MiB" else (outcomes[name] + int(times))
            )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description="Read damaged files.")
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.files, args.seed)
        return
    start = time.monotonic()
    for outcome, times in sorted(run(args.files, args.seed, args.processes).items()):
        print(f"{outcome:40} {times:6}")
    print(f"{args.files} files in {time.monotonic() - start:.0f} s, none did harm")


if __name__ == "__main__":
    main()
