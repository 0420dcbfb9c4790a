"""The compiled CUDA kernels, looked at without a GPU: wide accesses, no local memory.

Torch's Linux wheels bring Triton, and Triton brings ``cuobjdump`` and ``nvdisasm``. They show the
machine code for sm_90 in the library that was built. A kernel that works on packs must load and
store 16 bytes by one instruction (8 where the pack has 8): nvcc takes a pack apart where it likes
to. And it must keep its numbers in registers: STL and LDL are loads and stores of local memory,
which lies in the device's memory.

By hand, ``python tests/kernels/test_machine_code.py FILE...`` prints every kernel of libraries,
objects and cubins with its accesses, and what the test has against it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

import mnist_ops

ARCHITECTURE = "sm_90"
# Kernels with local memory, of all of the library, none of those below.
MOST_WITH_LOCAL_MEMORY = 12
BYTES = {"double": 8, "float": 4, "Half": 2, "BFloat16": 2}


@dataclass(frozen=True)
class Packed:
    """Kernels that work on packs.

    Args:
        name: a pattern of the name and the template arguments, without namespaces. ``(?P<n>)`` are
            the elements of a pack and ``(?P<type>)`` is their type; without n it has 16 bytes.
        out: a pack of the output is this part of one of the input: 2 where windows have 2 x 2.
        rest: elements behind the last pack are stored one by one.
        ahead: so many loads of packs at least are under way while other packs are worked on.
        bulk: the copy engine moves images between global and shared memory, both ways.
    """

    name: str
    out: int = 1
    rest: bool = False
    ahead: int = 0
    bulk: bool = False


TYPE = "(?P<type>double|float|Half|BFloat16)"
N = "(?P<n>[248])"
PACKED = (
    # local_norm*.cu
    # one element at a time only where images do not begin with 16 bytes
    Packed(rf"image_kernel<\w+, \w+, \w+, {TYPE}>", bulk=True),
    Packed(f"apply_kernel<{N}, {TYPE}>"),
    # lp_pool_*.cu; the first argument is the norm, or there is none: p = 2
    # where rows of the output are no packs it is stored one by one
    Packed(f"forward_pairs_kernel<., {N}, {TYPE}>", out=2, rest=True),
    Packed(f"backward_tiles_kernel<., {N}, {TYPE}>"),
    Packed(f"backward_threes_kernel<{N}, {TYPE}>"),
    Packed(f"(forward|backward)_blocks_kernel<{N}, {TYPE}>"),
    # sigmoid.cu
    Packed(rf"map_kernel<{N}, \w+, \w+, {TYPE}>", rest=True),
    # softmax_*.cu; 0 is softmax, 1 log_softmax, 2 the loss, which stores no packs, 3 its
    # gradient, 4 any of them, which stores a loss by itself
    Packed(rf"(warp|block)_kernel<[013], \w+, {N}, Softmax(Forward|Backward)<{TYPE}> ?>"),
    Packed(rf"columns_kernel<[013], {N}, SoftmaxForward<{TYPE}> ?>"),
    Packed(rf"columns_kernel<4, {N}, SoftmaxBackward<{TYPE}> ?>"),
    Packed(rf"tile_kernel<[0134], \w+, Softmax(Forward|Backward)<{TYPE}> ?>", rest=True),
    Packed(f"forward_long_kernel<{N}, {TYPE}>", rest=True),
    Packed(f"backward_long_kernel<{N}, {TYPE}>"),
    # stage.cu; a few narrow stores are those of the rest of a map; four activations of two packs
    Packed(rf"tile_(forward|backward)_kernel<\w+, (?P<n>4), {TYPE}>", rest=True, ahead=8),
)


def tool(name: str) -> Path | None:
    """Return a program of the CUDA toolkit that Triton brings."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return path if path.exists() else None


def demangled(name: str) -> str:
    """Return a kernel's name and template arguments, without namespaces and its parameters."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    pointer = library.__cxa_demangle(name.encode(), None, None, None)
    if pointer is None:
        return name
    text = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    text = re.sub(r"\(anonymous namespace\)::|\b[a-z]\w*::", "", text)
    text = re.sub(r"\((?:\w+)\)(?=\d)", "", text.removeprefix("void "))  # (Norm)2: 2
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:i]
    return text


# An access: the instruction and its width in bytes. 4 where none is named. UBLKCP.S.G loads, .G.S
# stores what the copy engine moves.
ACCESS = re.compile(r"\b(UBLKCP\.[SG]|LDG|STG|LDGSTS|LDL|STL)\b([.\w]*)")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
REGISTER = re.compile(r"\bR(\d+)\b")
# A load is one ahead where so many instructions follow it before one that names its register.
AHEAD = 64

Kernels = dict[str, Counter[tuple[str, int]]]


def accesses(path: Path) -> Kernels:
    """Return the accesses to global and local memory of each kernel in a library or a cubin.

    A load of global memory that is not used soon counts as "AHEAD", too.
    """
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    assert cuobjdump and nvdisasm
    environment = {**os.environ, "PATH": f"{nvdisasm.parent}:{os.environ.get('PATH', '')}"}
    command = [str(cuobjdump), "-sass", "-arch", ARCHITECTURE, str(path)]
    kernels: Kernels = {}
    current: Counter[tuple[str, int]] = Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Function : " in line:
                current = kernels.setdefault(demangled(line.split()[-1]), Counter())
                loaded: dict[str, tuple[int, int]] = {}  # register: instruction, width
                number = 0
                continue
            instruction, semicolon, _ = line.partition(";")
            if not semicolon:
                continue
            number += 1
            for register in REGISTER.findall(instruction):
                since, width = loaded.pop(register, (number, 0))
                if number - since >= AHEAD:
                    current["AHEAD", width] += 1
            if found := ACCESS.search(instruction):
                widths = [WIDTHS[word] for word in found[2].split(".") if word in WIDTHS]
                width = widths[0] if widths else 4
                current[found[1], width] += 1
                if found[1] == "LDG":
                    loaded[REGISTER.findall(instruction)[0]] = (number, width)
    assert process.returncode == 0
    return kernels


def in_local_memory(found: Counter[tuple[str, int]]) -> int:
    """Return how many instructions load or store local memory."""
    return sum(count for (kind, _), count in found.items() if kind in ("LDL", "STL"))


def faults(name: str, found: Counter[tuple[str, int]]) -> list[str]:
    """Return what is wrong with one kernel, nothing where it is none of PACKED."""
    for packed in PACKED:
        match = re.fullmatch(packed.name, name)
        if match is None:
            continue
        groups = match.groupdict()
        size = int(groups["n"]) * BYTES[groups["type"]] if groups.get("n") else 16
        load, store = min(size, 16), min(size // packed.out, 16)

        narrow = sum(n for (kind, width), n in found.items() if kind == "STG" and width < store)
        wrong = []
        if packed.bulk:
            ways = ("UBLKCP.S", "UBLKCP.G")
            wrong += [f"no {way}" for way in ways if not any(kind == way for kind, _ in found)]
            if local := in_local_memory(found):
                wrong.append(f"{local} accesses to local memory")
            return wrong
        if not found["LDG", load] and not found["LDGSTS", load]:
            wrong.append(f"no load of {load} bytes")
        if not found["STG", store]:
            wrong.append(f"no store of {store} bytes")
        if narrow and not packed.rest:
            wrong.append(f"{narrow} stores of less than {store} bytes")
        if found["AHEAD", load] < packed.ahead:
            wrong.append(f"{found['AHEAD', load]} loads ahead instead of {packed.ahead}")
        if local := in_local_memory(found):
            wrong.append(f"{local} accesses to local memory")
        return wrong
    return []


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The accesses of every kernel of the library that was built."""
    library = Path(mnist_ops.__file__).parent / "_cuda.so"
    if not library.exists():
        pytest.skip(f"{library} was not built")
    for name in ("cuobjdump", "nvdisasm"):
        if tool(name) is None:
            pytest.skip(f"there is no {name}: it comes with Triton, with torch's wheels for CUDA")
    found = accesses(library)
    if not found:
        pytest.skip(f"{library} was not built for {ARCHITECTURE}")
    return found


@pytest.mark.parametrize("packed", PACKED, ids=lambda packed: packed.name)
def test_packs_stay_whole_and_in_registers(kernels, packed):
    names = [name for name in kernels if re.fullmatch(packed.name, name)]
    assert names, "no kernel has such a name"
    wrong = {name: faults(name, kernels[name]) for name in names}
    assert not {name: what for name, what in wrong.items() if what}


def test_few_kernels_have_local_memory(kernels):
    local = {name: count for name, found in kernels.items() if (count := in_local_memory(found))}
    assert len(local) <= MOST_WITH_LOCAL_MEMORY, sorted(local)
    for name in ("run_phases<float>", "run_phases<double>"):
        assert name in kernels and name not in local


def test_faults_are_found():
    """The rules themselves: kernels that are right, and the same ones spoilt."""
    name = "apply_kernel<8, BFloat16>"
    right = Counter({("LDG", 16): 2, ("LDG", 4): 24, ("STG", 16): 2})
    assert faults(name, right) == []
    assert faults(name, right + Counter({("STG", 2): 1})) == ["1 stores of less than 16 bytes"]
    assert faults(name, right + Counter({("LDL", 4): 3})) == ["3 accesses to local memory"]
    assert faults(name, Counter({("LDG", 8): 4, ("STG", 8): 4})) == [
        "no load of 16 bytes",
        "no store of 16 bytes",
        "4 stores of less than 16 bytes",
    ]
    eight = "columns_kernel<4, 4, SoftmaxBackward<Half> >"
    assert faults(eight, Counter({("LDG", 8): 8, ("STG", 8): 4})) == []
    pairs = "forward_pairs_kernel<2, 8, Half>"
    assert faults(pairs, Counter({("LDG", 16): 2, ("STG", 8): 1})) == []
    assert faults("prepare_kernel<float>", Counter({("LDL", 4): 1})) == []
    image = Counter({("UBLKCP.S", 4): 2, ("UBLKCP.G", 4): 1, ("STG", 4): 1})
    assert faults("image_kernel<true, false, 4, float>", image) == []
    del image["UBLKCP.G", 4]
    assert faults("image_kernel<true, false, 4, float>", image) == ["no UBLKCP.G"]
    tile = Counter({("LDG", 8): 16, ("STG", 8): 16, ("AHEAD", 8): 8})
    assert faults("tile_forward_kernel<true, 4, Half>", tile) == []
    del tile["AHEAD", 8]
    assert faults("tile_forward_kernel<true, 4, Half>", tile) == ["0 loads ahead instead of 8"]
    assert demangled("_ZN9mnist_ops4cuda12_GLOBAL__N_114prepare_kernelIfEEvlPT_") == (
        "prepare_kernel<float>"
    )


if __name__ == "__main__":
    for file in sys.argv[1:]:
        listed = accesses(Path(file))
        for kernel, found in sorted(listed.items()):
            text = " ".join(f"{kind}.{8 * width}:{n}" for (kind, width), n in sorted(found.items()))
            print(f"{kernel}  {text}  {'; '.join(faults(kernel, found)) or 'fine'}")
        local = sum(1 for found in listed.values() if in_local_memory(found))
        print(f"{local} of {len(listed)} kernels use local memory")
