"""Clocks of the benchmarks: blocks of calls, contenders interleaved, kernels counted."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: What is timed: a call without arguments.
Call = Callable[[], Any]
#: Prepares n calls, outside the timing.
Prepare = Callable[[int], Sequence[Call]]


class CPUClock:
    """Times blocks of calls with the system's clock."""

    device = "cpu"
    #: Calls that a block repeats to last about this long, in seconds.
    block_s = 1e-3
    most_calls = 64

    def seconds(self, calls: Sequence[Call]) -> float:
        """Mean time of one of the calls, which follow each other."""
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    def sets(self, moved: int) -> int:
        """How many sets of arguments to rotate: one; a network finds its input in cache too."""
        return 1

    def synchronize(self) -> None:
        """Wait for nothing: the CPU is done when it returns."""

    def lost(self) -> bool:
        """Whether the device has stopped working, as one does after a fault in a kernel."""
        return False


class CUDAClock:
    """Times blocks of calls with events on the current stream.

    Before each block a buffer of several times the L2 cache is overwritten: nothing of the
    arguments is left in the cache, and while the device is at it the CPU can queue the first calls,
    so that their launches are not timed. Arguments rotate, for the calls of a block do not find
    those of the call before either. Small calls are bound by their launches all the same, as they
    are in eager PyTorch.
    """

    device = "cuda"
    block_s = 0.0  # as many calls as there are sets of arguments
    most_calls = 256

    def __init__(self) -> None:
        self.cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
        self.flush = torch.empty(max(8 * self.cache, 2**28), dtype=torch.int8, device="cuda")

    def seconds(self, calls: Sequence[Call]) -> float:
        """Mean time of one of the calls, which follow each other."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    def sets(self, moved: int) -> int:
        """How many sets of arguments exceed the cache several times over."""
        return min(max(1, -(-8 * self.cache // max(moved, 1))), self.most_calls)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def lost(self) -> bool:
        """Whether the device has stopped working, as one does after a fault in a kernel."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # after a want of memory, all of it for the next
        except Exception:
            return True
        return False


Clock = CPUClock | CUDAClock


def clock_for(device: str) -> Clock:
    """The clock of a device."""
    return CUDAClock() if device == "cuda" else CPUClock()


def reason(error: Exception) -> str:
    """An exception as the first of its lines, and not too much of it."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"


def interleave(
    clock: Clock,
    contenders: dict[str, Prepare],
    *,
    sets: int,
    rounds: int,
    most_s: float,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time contenders in turns.

    Args:
        clock: of the device.
        contenders: functions of a number n, which prepare n calls outside the timing.
        sets: of arguments; a block is at least a call for each.
        rounds: each times one block of every contender; the first to go changes from round to
            round.
        most_s: fewer rounds, but three, where they would take longer than this many seconds.

    Returns:
        Seconds of a call, one for each round, by contender; and, instead, why a contender failed.
    """
    times: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    calls: dict[str, int] = {}
    spent = 0.0
    for name, prepare in contenders.items():
        try:
            for _ in range(3):  # compilers, caches, allocators
                clock.seconds(prepare(sets))
            start = time.perf_counter()
            one = clock.seconds(prepare(sets))
            blocks = max(1, int(clock.block_s / max(one, 1e-9)))
            calls[name] = min(max(sets, blocks), clock.most_calls)
            spent += (time.perf_counter() - start) * calls[name] / sets
        except Exception as error:
            failures[name] = reason(error)
            clock.synchronize()  # raises again where the device itself is lost
    names = list(calls)
    rounds = max(min(rounds, 3), min(rounds, int(most_s / max(spent, 1e-9))))
    for turn in range(rounds):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            times.setdefault(name, []).append(clock.seconds(contenders[name](calls[name])))
    return times, failures


def copies(sets: int, size: int, device: str) -> Prepare:
    """A contender that copies so many bytes; from and to as many places as there are sets."""
    # A narrow range of values would do, but not zeros: pages of zeros may be one page in cache.
    from_, to = torch.empty((2, sets, size), dtype=torch.int8, device=device).random_()

    def copy(i: int) -> Call:
        source, target = from_[i], to[i]
        return lambda: target.copy_(source)

    return lambda n: [copy(i % sets) for i in range(n)]


def copy_bandwidth(clock: Clock, size: int, rounds: int = 15) -> float:
    """Bytes a second of a large copy, size bytes read and written in all; median of rounds."""
    prepare = copies(1, size // 2, clock.device)
    for _ in range(3):
        clock.seconds(prepare(1))
    return size / statistics.median(clock.seconds(prepare(1)) for _ in range(rounds))


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over the rounds of a's time over b's in that round."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def kernels_in(trace: dict[str, Any]) -> tuple[int, float]:
    """Kernels, copies and fills on the device in a profiler's trace; microseconds they took."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [e.get("dur", 0) for e in trace["traceEvents"] if e.get("cat") in kinds]
    return len(found), float(sum(found))


def count_kernels(calls: Sequence[Call]) -> tuple[float, float]:
    """What one call launches on the device, and the microseconds the device works on it."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        for call in calls:
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path) as file:
            launches, microseconds = kernels_in(json.load(file))
    return launches / len(calls), microseconds / len(calls)
