"""The CUDA kernels without a GPU: csrc/cuda/*.cu, emulated, against the CPU's own kernels.

The sources are compiled as C++ with ``cuda_emulator`` in the place of CUDA's headers, and every
thread of a block runs as a fiber, in random order between barriers. The operators that come out,
``torch.ops.mnist_ops_emulated``, take tensors on the CPU.

What this shows: indices, strides, masks, tails and grid-stride loops; the choice of a kernel and of
its launch by shape, layout and alignment; reductions and their order; barriers and warp shuffles
that not every thread reaches; barriers that are missing, as far as some order of whole threads
makes them visible (each call runs in two orders, which must give the same bits); asynchronous
copies that nobody waits for, and bulk copies that the copy engine would not take. Inputs lie among
NaN and fresh memory is filled with NaN, so a read outside of an input, or of what was never
written, shows as well.

What it does not show: races on a finer scale (fibers change over at barriers only, memory is
sequentially consistent, blocks run one after the other), limits of launches and registers, what
nvcc rejects or compiles differently, the device's own exp, log, pow and fused multiply-adds, writes
out of bounds that hit nothing, streams, devices, speed. The tests of the operators show those, on a
machine with a GPU.
"""

from __future__ import annotations

import ctypes
import math
import random
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

import mnist_ops

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Of the largest magnitude that went in or came out. Sums of 3000 terms in another order.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def build(folder: Path, compiler: str) -> Path:
    """Compile the emulated library, two files at a time: about 20 s of one processor."""
    emulator = Path(__file__).parent / "cuda_emulator"
    major, minor = map(int, str(mnist_ops.build_info()["target_torch"]).split("."))
    # -Dmnist_ops=... renames the library in which the operators are registered, and the namespace.
    options = [
        "-x",
        "c++",
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
    ]
    options += ["-DMNIST_OPS_CUDA_EMULATOR", "-Dmnist_ops=mnist_ops_emulated"]
    # A GPU refuses a pack at an address that is none of its own; here the process ends (SIGILL).
    options += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    options += ["-U_FORTIFY_SOURCE"]  # which takes a jump between stacks for an error
    options += ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"]
    options += [f"-I{path}" for path in (emulator, *cpp_extension.include_paths())]
    sources = [*(ROOT / "csrc" / "cuda").glob("*.cu"), *emulator.glob("*.cpp")]
    sources.sort(key=lambda source: -source.stat().st_size)  # what takes longest goes first
    sources.append(ROOT / "csrc" / "library.cpp")

    def run(*command: str | Path) -> None:
        outcome = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert outcome.returncode == 0, f"{command}\n{outcome.stderr}"

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        run(compiler, *options, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "mnist_ops_emulated.so"
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    run(compiler, "-shared", "-o", library, *objects, *libraries, "-ltorch_cpu", "-ltorch", "-lc10")
    return library


@dataclass(frozen=True)
class Mode:
    """How kernels are launched: as on a GPU, or so that small tensors take large ones' paths."""

    name: str
    max_blocks: int = 2**62
    largest_narrow_index: int = 2**31 - 1
    image_bytes: int = 48 << 10  # of registers, and of shared memory, for images that stay there

    def __str__(self) -> str:
        return self.name


MODES = (
    Mode("as on a GPU"),
    Mode("64-bit indices", largest_narrow_index=0, image_bytes=0),
    Mode("grids of 2 blocks", max_blocks=2, image_bytes=12 << 10),
    Mode("64-bit indices, grids of 2 blocks", 2, largest_narrow_index=0, image_bytes=0),
)


@pytest.fixture
def configure(emulated_cuda: ctypes.CDLL) -> Callable[[int, int, int, int], None]:
    """A function that says what is emulated."""
    function, images = (
        emulated_cuda.configure_cuda_emulator,
        emulated_cuda.configure_emulated_images,
    )
    function.argtypes, function.restype = (ctypes.c_int64, ctypes.c_int64, ctypes.c_uint32), None
    images.argtypes, images.restype = (ctypes.c_int64,), None

    def configure(max_blocks: int, narrow: int, image_bytes: int, seed: int) -> None:
        function(max_blocks, narrow, seed)
        images(image_bytes)

    return configure


@pytest.fixture(autouse=True)
def _memory_filled_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Emulator:
    """Calls operators on both backends and compares what they give."""

    def __init__(self, configure: Callable[[int, int, int, int], None], mode: Mode) -> None:
        self.configure, self.mode = configure, mode

    def __call__(self, name: str, *arguments: object) -> tuple[Tensor, ...]:
        """What the emulated operator gives, whatever the order of its threads."""
        results = []
        for seed in (0, 1):
            mode = self.mode
            self.configure(mode.max_blocks, mode.largest_narrow_index, mode.image_bytes, seed)
            result = getattr(torch.ops.mnist_ops_emulated, name)(*arguments)
            results.append(result if isinstance(result, tuple) else (result,))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        return results[0]

    def check(self, name: str, *arguments: object, loosen: float = 1.0) -> Tensor:
        """Compare with the CPU's operator; its (first) result."""
        actual = self(name, *arguments)
        result = getattr(torch.ops.mnist_ops, name)(*arguments)
        expected = result if isinstance(result, tuple) else (result,)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert ours.numel() == 0 or ours.stride() == theirs.stride()
            close(ours, theirs, arguments[0], loosen)
        return expected[0]


@pytest.fixture(params=MODES, ids=str)
def emulator(request: pytest.FixtureRequest, configure: Callable) -> Emulator:
    return Emulator(configure, request.param)


def close(actual: Tensor, expected: Tensor, went_in: object, loosen: float = 1.0) -> None:
    """Rounding errors are relative to the largest number that a sum had to do with."""
    assert isinstance(went_in, Tensor)
    tolerance = loosen * TOLERANCE[went_in.dtype]
    numbers = torch.cat([t.double().flatten() for t in (expected, went_in)])
    numbers = numbers[numbers.isfinite()].abs()
    largest = numbers.max().item() if numbers.numel() else 0.0
    info = torch.finfo(went_in.dtype)
    atol = tolerance * largest + info.tiny * info.eps
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=atol, equal_nan=True
    )


# --------------------------------------------------------------------------------- random tensors


def placed(values: Tensor, layout: str) -> Tensor:
    """The same values at other addresses, with NaN (or -1) before, after and between them."""
    dim = values.dim()
    order = list(range(dim))  # dimensions, from the outermost in memory to the innermost
    if "channels last" in layout and dim == 4:
        order = [0, 2, 3, 1]
    if "transposed" in layout:
        order.reverse()
    step = 2 if "spaced" in layout else 1
    strides = [0] * dim
    distance = step
    for d in reversed(order):
        strides[d] = distance
        distance *= max(values.shape[d], 1)
    margin = 64 // values.element_size()  # torch aligns storages to 64 bytes
    offset = margin + ("misaligned" in layout)
    filler = math.nan if values.is_floating_point() else -1
    storage = torch.full((distance + 3 * margin,), filler, dtype=values.dtype)
    return storage.as_strided(values.shape, strides, offset).copy_(values)


LAYOUTS = (
    "contiguous",
    "misaligned",
    "channels last",
    "channels last, misaligned",
    "transposed",
    "spaced",
)
KINDS = ("normal",) * 4 + ("ties", "zero windows", "large", "tiny", "special")


class Cases:
    """A seeded source of shapes, layouts and values."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.random = random.Random(f"{seed} {dtype}")
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def choice(self, *options):
        return self.random.choice(options)

    def normal(self, shape, layout: str | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return placed(values.to(self.dtype), layout or self.random.choice(LAYOUTS))

    def values(self, shape, layout: str | None = None, kind: str | None = None) -> Tensor:
        """Of one kind, in one layout; both are drawn where they are not given."""
        kind = kind or self.random.choice(KINDS)
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        # Squares over- and underflow, the values themselves do not.
        factor = {torch.float16: 2e3, torch.float64: 1e170}.get(self.dtype, 1e21)
        if kind == "ties":
            values = values.round().clamp(-1, 1)
        elif kind == "zero windows":
            values *= values > 1
        elif kind in ("large", "tiny"):
            values = values * factor if kind == "large" else values / factor
        elif kind == "special" and values.numel():
            for special in (math.nan, math.inf, -math.inf):
                if self.random.random() < 0.5:
                    values.view(-1)[self.random.randrange(values.numel())] = special
        return placed(values.to(self.dtype), layout or self.random.choice(LAYOUTS))

    def image_shape(self) -> tuple[int, ...]:
        """Mostly small; some with more pixels, or more elements, than two blocks have threads."""
        draw = self.random.randint
        shape = self.choice(
            (draw(1, 3), draw(1, 5), draw(1, 9), draw(1, 9)),
            (draw(1, 2), self.choice(8, 16, 33, 70), draw(1, 8), draw(1, 8)),
            (2, self.choice(1, 3, 8), 8 + draw(0, 9), 24),
            (3, self.choice(2, 4, 9), 15, 16),
        )
        if self.random.random() < 0.05:
            shape = (0, *shape[1:])
        return shape[1:] if self.random.random() < 0.15 else shape


def cases(count: int) -> Callable:
    """Run a test for every dtype with ``count`` seeds, one source of random cases each."""

    def decorate(test: Callable) -> Callable:
        def run(emulator: Emulator, dtype: torch.dtype) -> None:
            # Other cases in every mode: no mode needs the same ones.
            first = 1000 * MODES.index(emulator.mode)
            for seed in range(first, first + count):
                try:
                    test(emulator, Cases(seed, dtype))
                except Exception as error:
                    error.args = (f"case {seed}: {error}", *error.args[1:])
                    raise

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return pytest.mark.parametrize("dtype", DTYPES, ids=str)(run)

    return decorate


# --------------------------------------------------------------------------------------- operators


@cases(12)
def test_sigmoid(emulator: Emulator, case: Cases):
    sizes = [(), (0,), (1,), (3,), (8,), (17,), (4, 5, 6), (2, 3, 5, 7), (1023,), (9001,)]
    shape = case.choice(*sizes)
    x = 4 * case.normal(shape)
    x = placed(x, case.choice(*LAYOUTS))
    if x.numel() > 5:
        x.permute(*range(x.dim()))[(0,) * x.dim()] = case.choice(math.nan, math.inf, -math.inf, 200)
    y = emulator.check("sigmoid", x)
    emulator.check("sigmoid_backward", case.normal(shape), y)


@cases(16)
def test_lp_pool2d(emulator: Emulator, case: Cases):
    shape = case.image_shape()
    draw = case.random.randint
    kernel, stride, padding = [], [], []
    for size in shape[-2:]:
        # Padding, of up to half of the kernel, lets one be larger than the image.
        k = min(draw(1, 7), 2 * size)
        kernel.append(k)
        stride.append(draw(1, 4))
        padding.append(max(draw(0, k // 2), (k - size + 1) // 2))
    norm = case.choice(1.0, 2.0, math.inf, 3.0, 0.5, 1.5)
    windows = (norm, kernel, stride, padding, case.choice(False, True))
    x = case.values(shape)
    y = emulator.check("lp_pool2d", x, *windows)
    grad = case.normal(y.shape)
    emulator.check("lp_pool2d_backward", grad, x, y, *windows, loosen=4)
    direction = case.normal(shape)
    emulator.check("lp_pool2d_double_backward", direction, grad, x, y, *windows, loosen=10)


@cases(12)
def test_lp_pool2d_by_tensor(emulator: Emulator, case: Cases):
    """Windows of one thread and, large ones in NCHW, of several; p for each channel."""
    shape = case.image_shape()
    draw = case.random.randint
    whole = case.choice(False, False, True)
    kernel = [size if whole else min(draw(1, 7), size) for size in shape[-2:]]
    windows = (kernel, [draw(1, 4), draw(1, 4)], [draw(0, k // 2) for k in kernel])
    dtype = torch.float64 if case.dtype is torch.float64 else torch.float32
    p = torch.rand(shape[-3], generator=case.generator, dtype=dtype) * 4 + 0.5
    rest = (*windows, case.choice(False, True), case.choice(False, True))
    x = case.values(shape, kind=case.choice("normal", "ties", "zero windows", "special"))
    y = emulator.check("lp_pool2d_tensor_p", x, p, *rest)
    grad = case.normal(y.shape)
    ours = emulator("lp_pool2d_tensor_p_backward", grad, x, p, *rest)
    theirs = torch.ops.mnist_ops.lp_pool2d_tensor_p_backward(grad, x, p, *rest)
    close(ours[0], theirs[0], grad, loosen=4)
    assert ours[0].numel() == 0 or ours[0].stride() == theirs[0].stride()
    # Of terms of either sign, one for each window, in the type that is computed in.
    tolerance = (1e-12 if dtype is torch.float64 else 1e-4) * max(1, y.numel()) ** 0.5
    torch.testing.assert_close(ours[1], theirs[1], rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2, 12])
def test_gradient_of_a_small_p(emulator: Emulator, dtype: torch.dtype, size: int):
    """Its terms cancel; on the CPU it is held against its series in p."""
    x = (torch.rand(2, 3, 12, 12) + 0.5).to(dtype)
    p = torch.tensor([1e-1, 1e-2, 1e-3], dtype=dtype)
    rest = ([size, size], [size, size], [0, 0], False, True)
    grad = torch.ones_like(torch.ops.mnist_ops.lp_pool2d_tensor_p(x, p, *rest))
    ours = emulator("lp_pool2d_tensor_p_backward", grad, x, p, *rest)[1]
    theirs = torch.ops.mnist_ops.lp_pool2d_tensor_p_backward(grad, x, p, *rest)[1]
    assert ((ours - theirs) / theirs * p).abs().max() < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.1, 1.9])
@pytest.mark.parametrize("average", [None, False, True])
def test_quotients_below_the_range(
    emulator: Emulator, dtype: torch.dtype, p: float, average: bool | None
):
    """Of a number (None) and of a tensor, with the CPU's kernels to a relative error."""
    limits = torch.finfo(dtype)
    exponents = torch.rand(8, 2, 2, 2, dtype=torch.float64) * 1.8 - 0.9
    x = (exponents * math.log(limits.max) * (0.8 if average is None else 1)).exp().to(dtype)
    name = "lp_pool2d" if average is None else "lp_pool2d_tensor_p"
    rest = ([2, 2], [2, 2], [0, 0], False, *(() if average is None else (average,)))
    powers = p if average is None else torch.full((2,), p, dtype=dtype)
    y = getattr(torch.ops.mnist_ops, name)(x, powers, *rest)
    grad = torch.ones_like(y)
    inputs = (grad, x, y, powers) if average is None else (grad, x, powers)
    pairs = [(emulator(name, x, powers, *rest)[0], y)]
    theirs = getattr(torch.ops.mnist_ops, f"{name}_backward")(*inputs, *rest)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    pairs.append((emulator(f"{name}_backward", *inputs, *rest)[0], theirs))
    if average is None:
        direction = torch.rand(x.shape).to(dtype)
        seconds = torch.ops.mnist_ops.lp_pool2d_double_backward(direction, *inputs, *rest)
        pairs += zip(
            emulator("lp_pool2d_double_backward", direction, *inputs, *rest), seconds, strict=True
        )
    for ours, other in pairs:
        inside = (other.abs() > 100 * limits.tiny) & (other.abs() < limits.max / 1000)
        assert inside.any()
        tolerance = 2e-4 if dtype is torch.float32 else 1e-12
        torch.testing.assert_close(ours[inside], other[inside], rtol=tolerance, atol=0)


POOLED_SHAPES = (
    (2, 3, 8, 16),
    (1, 2, 9, 16),  # a row, or a column, that no window of two has
    (1, 2, 8, 17),
    (2, 2, 28, 28),
    (1, 3, 7, 12),
    (3, 16, 6, 5),
    (2, 8, 9, 9),
    (1, 24, 8, 11),
    (2, 16, 7, 6),
    (1, 40, 12, 10),
    (7, 2, 16, 24),  # more than two blocks' work
    (2, 1, 3, 8),
)


@cases(24)
def test_lp_pool2d_of_common_windows(emulator: Emulator, case: Cases):
    """2x2 and 3x3 with stride 2, and packs of channels: the kernels with vector accesses."""
    shape = case.choice(*POOLED_SHAPES)
    size = case.choice(2, 3)
    norm = case.choice(1.0, 2.0, 2.0, math.inf, 3.0, 4.0, 0.5)
    windows = (norm, [size] * 2, [2, 2], [0, 0], case.choice(False, False, True))
    if case.random.random() < 0.2:
        windows = (norm, [3, 2], [1, 2], [1, 0], False)
    x = case.values(shape, case.choice("contiguous", "contiguous", "channels last", "misaligned"))
    y = emulator.check("lp_pool2d", x, *windows)
    grad = case.normal(y.shape)
    emulator.check("lp_pool2d_backward", grad, x, y, *windows, loosen=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 0), (2, 3, 0, 4), (3, 0, 0), (0, 3, 4, 4), (2, 0, 4, 4)], ids=str
)
def test_pool_and_stage_of_images_of_nothing(emulator: Emulator, shape: tuple, dtype: torch.dtype):
    x = torch.zeros(shape, dtype=dtype)
    kernel = torch.ones(3)
    for norm in (1.0, 2.0, 3.0, math.inf):
        windows = (norm, [2, 2], [1, 1], [1, 1], False)
        y = emulator.check("lp_pool2d", x, *windows)
        emulator.check("lp_pool2d_backward", y, x, y, *windows)
        emulator.check("lp_pool2d_double_backward", x, y, x, y, *windows)
        y = emulator.check("stage2d", x, kernel, "sigmoid", *windows)
        assert (y == 0).all()
        emulator.check("stage2d_backward", y, x, kernel, "sigmoid", *windows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity"])
def test_activations(emulator: Emulator, dtype: torch.dtype, layout: str, activation: str):
    x = placed(torch.randn(3, 5, 6, 7).to(dtype), layout)
    a = emulator.check("activate", x, activation)
    emulator.check("activate_backward", torch.randn_like(a), a, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_long_sums_of_pools_and_stages(emulator: Emulator, dtype: torch.dtype, layout: str):
    """All elements equal: one accumulator in float32 would drift, here by 2e-5."""
    x = placed(torch.full((1, 16, 40, 50), 0.3).to(dtype), layout)
    kernel = [40, 50]
    rtol = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, TOLERANCE[dtype])
    for norm in (1.0, 2.0, 3.0, 1.5):
        options = (norm, kernel, kernel, [0, 0], False)
        (y,) = emulator("lp_pool2d", x, *options)
        exact = x[0, 0, 0, 0].double() * 2000 ** (1 / norm)
        torch.testing.assert_close(y.double(), exact.expand_as(y), rtol=rtol, atol=0)
        directional, _ = emulator("lp_pool2d_double_backward", x, y, x, y, *options)
        torch.testing.assert_close(directional.double(), exact.expand_as(y), rtol=10 * rtol, atol=0)
        pair = torch.stack([x[:, 0], 3 * x[:, 0]], 1)
        (z,) = emulator("stage2d", pair, torch.ones(1), "identity", *options)
        torch.testing.assert_close(z[0, 1].double().item(), exact.item(), rtol=3 * rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_of_p_at_the_ends_of_its_range(emulator: Emulator, dtype: torch.dtype):
    x = torch.tensor([[[1.0, -1.0, 0.5, 2.0], [1.0, 1.0, 0.0, -0.25]]]).to(dtype)
    x = torch.cat([x, x.flip(-1)]).unsqueeze(0)
    for norm in (1e-30, 1e-3, 2e3, 1e6, 3e7, 1e30, 1e39, 1e300):
        windows = (norm, [2, 2], [2, 2], [0, 0], False)
        y = emulator.check("lp_pool2d", x, *windows)
        emulator.check("lp_pool2d_backward", torch.ones_like(y), x, y, *windows)
        emulator.check("stage2d", x, torch.ones(1), "tanh", *windows)
        if norm > 1:
            emulator.check("stage2d_backward", y, x, torch.ones(1), "identity", *windows, loosen=4)
    for bad in (math.nan, 0.0, -1.0, 1e-310 if dtype == torch.float64 else 1e-39):
        for name, rest in (("lp_pool2d", ()), ("stage2d", (torch.ones(1), "tanh"))):
            with pytest.raises(RuntimeError, match=f"^{name}: norm_type must be"):
                emulator(name, x, *rest, bad, [2, 2], [2, 2], [0, 0], False)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_gradient_of_a_stage_of_saturated_units(configure, dtype, activation: str, layout: str):
    """act'(x) to the digits of the type, however small: 1 - tanh^2 has none of them left."""
    emulator = Emulator(configure, MODES[0])
    x = torch.linspace(-20, 20, 81, dtype=torch.float64).to(dtype)[:, None, None, None]
    x = placed(x.expand(81, 4, 2, 4), layout)
    grad = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=dtype)[None, :, None, None]
    options = (torch.ones(1), activation, 2.0, [2, 2], [2, 2], [0, 0], False)
    (ours,) = emulator("stage2d_backward", grad.expand(81, 4, 1, 2).contiguous(), x, *options)
    e = torch.exp(-(2 if activation == "tanh" else 1) * x.double().abs())
    slope = (4 if activation == "tanh" else 1) * e / (1 + e) ** 2
    sign = x.double().sign() if activation == "tanh" else 1.0
    expected = 0.5 * grad.double() * sign * slope  # y is twice any of its four equal elements
    subnormal = 6e-8 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        ours.double(), expected, rtol=4 * TOLERANCE[dtype] / 3, atol=subnormal
    )


@cases(10)
def test_local_normalization(emulator: Emulator, case: Cases):
    shape = case.image_shape()
    # Far values would only tell how far the threshold is from the noise of rounding.
    x = case.values(
        shape, kind=case.choice("normal", "normal", "normal", "zero windows", "special")
    )
    sizes = [case.choice(1, 3, 5, 9, 21) for _ in range(case.choice(1, 2))]
    kernel = (torch.rand(sizes, generator=case.generator) + 0.1).to(case.choice(*DTYPES))
    kernel = placed(kernel, case.choice("contiguous", "misaligned", "spaced"))
    thresholds = case.choice((1e-4, 1e-4), (0.8, 1.0), (1.2, 0.5))
    grad = case.normal(shape)
    emulator.check("subtractive_norm2d", x, kernel)
    emulator.check("subtractive_norm2d_backward", grad, kernel)
    for name in ("divisive_norm2d", "contrastive_norm2d"):
        emulator.check(name, x, kernel, *thresholds, loosen=4)
        emulator.check(f"{name}_backward", grad, x, kernel, *thresholds, loosen=20)


@cases(12)
def test_local_mean(emulator: Emulator, case: Cases):
    shape = case.image_shape()
    x, grad = case.values(shape), case.normal(shape)
    mode = case.choice("renormalized", "zeros", "reflect", "replicate")
    most = min(shape[-2:]) - 1 if mode == "reflect" else 20  # a radius; nothing is there to reflect
    separable = mode == "renormalized" or case.choice(True, False)
    sizes = [2 * min(case.choice(0, 1, 2, 4, 10), most) + 1 for _ in range(2 - separable)]
    kernel = (torch.rand(sizes, generator=case.generator) + 0.1).to(case.choice(*DTYPES))
    kernel = placed(kernel, case.choice("contiguous", "misaligned", "spaced"))
    emulator.check("local_mean2d", x, kernel, mode)
    emulator.check("local_mean2d_backward", grad, kernel, mode)


@cases(16)
def test_stage2d(emulator: Emulator, case: Cases):
    """A block for an image, in pairs of rows and window by window; larger maps step by step."""
    draw = case.random.randint
    norm = case.choice(2.0, 2.0, 1.0, math.inf, 3.0)
    windows = ([2, 2], [2, 2], [0, 0], False)
    shape = case.choice(
        (draw(0, 3), case.choice(1, 3, 8, 17), 2 * draw(1, 7) + draw(0, 1), 2 * draw(1, 8)),
        (2, case.choice(16, 33), 2 * draw(2, 6), 4 * draw(1, 5)),
        (draw(1, 5), draw(2, 9), draw(2, 11)),
    )
    if case.random.random() < 0.5:
        kernel_size = [min(draw(1, 4), size) for size in shape[-2:]]
        padding = [draw(0, k // 2) for k in kernel_size]
        windows = (kernel_size, [draw(1, 3), draw(1, 3)], padding, case.choice(False, True))
    sizes = [case.choice(1, 3, 7, 15) for _ in range(case.choice(1, 2))]
    kernel = (torch.rand(sizes, generator=case.generator) + 0.1).to(case.choice(*DTYPES))
    kernel = placed(kernel, case.choice("contiguous", "misaligned", "spaced"))
    activation = case.choice("tanh", "relu", "sigmoid", "identity")
    kind = case.choice("normal", "normal", "ties", "zero windows", "special")
    if activation in ("relu", "identity"):  # the others make 0, 1/2 or 1 of such numbers
        kind = case.choice(kind, "large", "tiny")
    x = case.values(shape, kind=kind)
    options = (kernel, activation, norm, *windows)
    y = emulator.check("stage2d", x, *options, loosen=4)
    # Of elements that are equal but for rounding p = inf takes one or both.
    if norm != math.inf or activation in ("relu", "identity"):
        grad = case.normal(y.shape)
        emulator.check("stage2d_backward", grad, x, *options, loosen=20)


TILED_SHAPES = (
    (3, 8, 10, 12),  # packs of 4, packs of channels
    (2, 4, 9, 14),  # of 2; a last row in no window
    (4, 4, 8, 11),  # channels last: a last column in no window
    (2, 12, 7, 9),  # and both
    (1, 64, 28, 28),
    (9, 2, 2, 4),  # fewer pixels than a pack
    (3, 6, 6, 8),  # channels in no pack
    (7, 16, 10, 10),
)


@cases(10)
def test_stage2d_of_tiles(emulator: Emulator, case: Cases):
    """2 x 2 windows with p = 2 that tile the image, in both layouts."""
    activation = case.choice("tanh", "tanh", "relu", "sigmoid", "identity")
    kind = case.choice("normal", "normal", "ties", "zero windows", "special", "large", "tiny")
    if activation in ("tanh", "sigmoid") and kind == "tiny":
        kind = "normal"  # tanh of them: those of the identity
    layout = case.choice("contiguous", "channels last", "channels last", "misaligned")
    x = case.values(case.choice(*TILED_SHAPES), layout, kind)
    kernel = torch.rand(case.choice((1,), (7,), (15,), (3, 5)), generator=case.generator) + 0.1
    kernel = kernel.to(case.choice(*DTYPES))
    options = (kernel, activation, 2.0, [2, 2], [2, 2], [0, 0], case.choice(False, False, True))
    y = emulator.check("stage2d", x, *options, loosen=4)
    grad = case.normal(y.shape, case.choice("contiguous", layout))
    emulator.check("stage2d_backward", grad, x, *options, loosen=20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_map_too_large_for_a_block(configure, dtype: torch.dtype):
    """64 x 16 x 16 numbers in float32 are 64 KiB, more than the emulated block has."""
    emulator, case = Emulator(configure, MODES[0]), Cases(0, dtype)
    options = (mnist_ops.gaussian1d(5), "tanh", 2.0, [2, 2], [2, 2], [0, 0], False)
    for layout in ("contiguous", "channels last"):
        x = case.normal((1, 64, 32, 32), layout)
        y = emulator.check("stage2d", x, *options)
        emulator.check("stage2d_backward", case.normal(y.shape), x, *options, loosen=4)


@cases(4)
def test_local_normalization_of_larger_images(emulator: Emulator, case: Cases):
    """More pixels than shared memory takes, kernels beyond a tile's surroundings."""
    shape = case.choice((1, 3, 33, 40), (2, 2, 70, 31), (1, 8, 26, 40), (1, 1, 64, 64))
    x, grad = case.normal(shape), case.normal(shape)
    kernel = torch.rand(case.choice([3], [21], [23], [5, 3]), generator=case.generator) + 0.1
    emulator.check("subtractive_norm2d", x, kernel)
    emulator.check("subtractive_norm2d_backward", grad, kernel)
    name = case.choice("divisive_norm2d", "contrastive_norm2d")
    emulator.check(name, x, kernel, 1e-4, 1e-4, loosen=4)
    emulator.check(f"{name}_backward", grad, x, kernel, 1e-4, 1e-4, loosen=20)


def test_local_normalization_of_many_images(configure):
    """A launch of fewer blocks than images, and images too large for few blocks."""
    for mode in (MODES[0], MODES[2]):
        emulator = Emulator(configure, mode)
        generator = torch.Generator().manual_seed(0)
        for shape in ((2100, 1, 2, 3), (1, 600, 8, 8), (265, 150, 4, 4)):
            x = torch.randn(shape, generator=generator)
            kernel = torch.tensor([1.0, 2.0, 1.0])
            emulator.check("contrastive_norm2d", x, kernel, 1e-4, 1e-4, loosen=4)
            emulator.check("subtractive_norm2d_backward", x, kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 9, 30, 30), (1, 1024, 3, 3)], ids=str)
def test_local_normalization_where_a_block_has_no_share(configure, dtype, shape):
    """Of 9 channels, or 9 pixels in NHWC, three of a cluster's four blocks have all."""
    emulator = Emulator(configure, MODES[0])
    layout = "contiguous" if shape[1] == 9 else "channels last"
    case = Cases(3, dtype)
    x, grad = case.normal(shape, layout), case.normal(shape, layout)
    kernel = torch.tensor([1.0, 2.0, 4.0, 2.0, 1.0])
    emulator.check("subtractive_norm2d", x, kernel)
    emulator.check("subtractive_norm2d_backward", grad, kernel)
    for name in ("divisive_norm2d", "contrastive_norm2d"):
        emulator.check(name, x, kernel, 1e-4, 1e-4, loosen=4)
        emulator.check(f"{name}_backward", grad, x, kernel, 1e-4, 1e-4, loosen=20)


@cases(1)
def test_local_normalization_of_images_in_shared_memory(emulator: Emulator, case: Cases):
    """An image a block, one for two, four or eight, one that does not fit, and more than blocks.

    Of rows that are no packs, of channels that end within a pack, of more pixels than threads.
    """
    # In float32 an image has 4.5, 12 and 18 KiB, its planes 1.3 to 4.
    shapes = ((5, 18, 8, 8), (2, 48, 8, 8), (2, 72, 8, 8), (4, 13, 7, 9), (4, 3, 9, 12))
    shapes += ((2, 16, 5, 5), (4, 16, 6, 6), (4, 1, 20, 25))
    memory = emulator.mode.image_bytes
    sizes = (memory, 14 << 10, 9 << 10, 6 << 10, 4 << 10) if memory else (0,)
    for shape in shapes if memory else shapes[:1]:
        unaligned = case.choice("misaligned", "channels last, misaligned")
        for layout in ("contiguous", "channels last", unaligned):
            mode = replace(emulator.mode, image_bytes=case.choice(*sizes))
            one = Emulator(emulator.configure, mode)
            x, grad = case.normal(shape, layout), case.normal(shape, layout)
            kernel = torch.rand(case.choice([7], [5], [3, 5]), generator=case.generator) + 0.1
            one.check("subtractive_norm2d", x, kernel)
            one.check("subtractive_norm2d_backward", grad, kernel)
            for name in ("divisive_norm2d", "contrastive_norm2d"):
                one.check(name, x, kernel, 1e-4, 1e-4, loosen=4)
                one.check(f"{name}_backward", grad, x, kernel, 1e-4, 1e-4, loosen=20)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_local_normalization_of_images_of_any_magnitude(emulator: Emulator, dtype: torch.dtype):
    """In one block, in clusters of blocks, step by step: in units of a power of two each."""
    case = Cases(7, dtype)
    rtol = {torch.float64: 1e-11, torch.float32: 4e-5, torch.bfloat16: 0.24}[dtype]
    factors = [1e-36, 1e-30, 1e-22, 1e-16, 1e-10, 1.0, 1e10, 1e16, 1e20, 1e30, 1e37]
    if dtype == torch.float64:
        factors += [1e-300, 1e-200, 1e-120, 1e120, 1e200, 1e300]
    # The emulated memory holds an image of 1, 8 or 5 channels, or a part of one of 24.
    shapes = ((3, 1, 9, 8), (3, 8, 9, 8), (3, 5, 7, 9), (3, 24, 6, 8))
    for i, factor in enumerate(factors):
        for name in ("divisive_norm2d", "contrastive_norm2d"):
            shape = shapes[(i + len(name)) % 4]
            image = torch.randn(shape, generator=case.generator, dtype=torch.float64) * factor
            image[1, ..., :3] = 0
            image[2, 0, 4, 4] *= case.choice(1e6, 1e6 if factor > 1 else 1e30)
            if dtype != torch.float64:
                image.clamp_(-2e38, 2e38)
            layout = case.choice("contiguous", "channels last", "misaligned")
            x, grad = placed(image.to(dtype), layout), case.normal(shape, layout)
            kernel = torch.tensor([0.2, 0.7, 1.0, 0.6, 0.3], dtype=torch.float64)
            if case.random.random() < 0.25:
                kernel = torch.outer(kernel, kernel)  # not taken apart
            thresholds = case.choice((0.0, 1.0), (1e-4, 1e-4), (0.0, 1e-20), (1e20, 1e20))
            images = case.choice(emulator.mode.image_bytes, 5 << 10)
            mode = replace(emulator.mode, image_bytes=images if emulator.mode.image_bytes else 0)
            one = Emulator(emulator.configure, mode)
            (y,) = one(name, x, kernel, *thresholds)
            (grad_input,) = one(f"{name}_backward", grad, x, kernel, *thresholds)
            rows = kernel if kernel.dim() == 1 else kernel[2]
            expected = loops.norm_in_long_double(name, x, rows, *thresholds, grad)
            loops.assert_close_at_any_scale(y, expected[0], rtol)
            loops.assert_close_at_any_scale(grad_input, expected[1], rtol)


@pytest.mark.parametrize("image_bytes", (48 << 10, 0))
def test_local_normalization_changes_no_bit_of_images_in_range(configure, image_bytes: int):
    """One image out of range among others, and infinity and NaN, which stay where they are."""
    emulator = Emulator(configure, replace(MODES[0], image_bytes=image_bytes))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 12, 12, generator=generator)
    grad, kernel = torch.randn(x.shape, generator=generator), torch.tensor([1.0, 2.0, 1.0])
    spoilt = x.clone()
    spoilt[1] *= 1e25
    spoilt[3, 0, 2, 2], spoilt[3, 1, 9, 9] = math.inf, math.nan
    for name in ("divisive_norm2d", "contrastive_norm2d"):
        (y,), (z,) = (emulator(name, t, kernel, 0.1, 0.5) for t in (x, spoilt))
        assert torch.equal(y[::2], z[::2])
        torch.testing.assert_close(
            z[3], getattr(mnist_ops, name)(spoilt, kernel, 0.1, 0.5)[3], equal_nan=True
        )
        (y,), (z,) = (emulator(f"{name}_backward", grad, t, kernel, 0.1, 0.5) for t in (x, spoilt))
        assert torch.equal(y[::2], z[::2])
        assert z[3, :, 0, 11].isfinite().all() and z[3, :, 2, 2].isnan().any()


def test_kernels_that_sum_to_zero_give_no_number(configure):
    """The CPU refuses them; on a GPU the host would have to wait to know."""
    emulator = Emulator(configure, MODES[0])
    kernel = torch.tensor([1.0, -2.0, 1.0])
    (y,) = emulator("subtractive_norm2d", torch.randn(1, 2, 5, 5), kernel)
    assert not y.isfinite().any()
    windows = (2.0, [2, 2], [2, 2], [0, 0], False)
    (y,) = emulator("stage2d", torch.randn(1, 2, 8, 8), kernel, "tanh", *windows)
    assert not y.isfinite().any()


SOFTMAX_SIZES = (1, 2, 3, 7, 8, 10, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 300, 512, 513)
LONG_SOFTMAX_SIZES = (1000, 1024, 1025, 1500, 3000)


def softmax_shape(case: Cases) -> tuple[list[int], int]:
    """A shape and the dimension along which it has one of the sizes where kernels change."""
    dim = case.random.randint(0, 4)
    shape = [case.random.randint(1, 3) for _ in range(dim)]
    along = case.random.randrange(dim) if dim else 0
    if dim:
        shape[along] = case.choice(*SOFTMAX_SIZES, *(LONG_SOFTMAX_SIZES if dim < 3 else ()))
    # Many rows, or many lines, of few and of many elements: more than two blocks' work.
    drawn = case.random.random()
    if drawn < 0.15:
        shape, along = case.choice(([530, 1], 1), ([700, 5], 1), ([200, 10], 1), ([50, 40], 1))
    elif drawn < 0.3:
        shape, along = case.choice([2, 10, 20, 15], [2, 70, 7, 6], [3, 64, 40, 4], [2, 130, 16]), 1
    elif drawn < 0.35:  # lines that are held in registers, as far as they are
        shape, along = [case.choice(1, 3), case.choice(5, 33, 128, 255, 257), 8], 1
    elif drawn < 0.4 and dim:
        shape[0] = 0
    return shape, along


def scores(case: Cases, shape: list[int]) -> Tensor:
    """Scores that may hold -inf, +inf and NaN."""
    x = 3 * torch.randn(shape, generator=case.generator, dtype=torch.float64)
    drawn = case.random.random()
    if drawn < 0.3 and x.numel() > 3:
        for special in (math.nan, math.inf, -math.inf, -math.inf, -math.inf):
            if case.random.random() < 0.4:
                x.view(-1)[case.random.randrange(x.numel())] = special
    elif drawn < 0.36:
        x.fill_(-math.inf)
    elif drawn < 0.42:
        x *= 1e4
    return placed(x.to(case.dtype), case.choice(*LAYOUTS))


@cases(16)
def test_softmax_and_log_softmax(emulator: Emulator, case: Cases):
    shape, dim = softmax_shape(case)
    x, grad = scores(case, shape), case.normal(shape)
    if shape and case.random.random() < 0.5:
        dim -= len(shape)
    beta = case.choice(1.0, -0.7, 2.5)
    for name in ("softmax", "log_softmax"):
        y = emulator.check(name, x, dim, beta, loosen=2)
        emulator.check(f"{name}_backward", grad, y, dim, beta, loosen=20)


# Rows that a warp, a block, a cluster of blocks (there is none in the modes with 64-bit indices) or
# nobody can hold; multiples of a pack, and others.
ROW_SIZES = (24, 64, 256, 264, 520, 1024, 1032, 2048, 4104, 8192, 8200, 9001)
ROW_SIZES += (16384, 16392, 32768, 32776, 33001, 65544, 80000)


@cases(5)
def test_softmax_of_every_length_of_rows(emulator: Emulator, case: Cases):
    size = case.choice(*ROW_SIZES)
    shape = [case.choice(1, 3), size]
    x = placed(scores(case, shape), case.choice("contiguous", "contiguous", "misaligned"))
    grad = case.normal(shape, case.choice("contiguous", "contiguous", "misaligned"))
    beta = case.choice(1.0, -0.7)
    for name in ("softmax", "log_softmax"):
        y = emulator.check(name, x, 1, beta, loosen=2)
        emulator.check(f"{name}_backward", grad, y, 1, beta, loosen=20)
    target = torch.randint(size, shape[:1], generator=case.generator)
    options = nll_options(case, size)
    emulator.check("softmax_nll", x, target, *options(beta, "none"), loosen=2)
    arguments = x, target, torch.ones(0), *options(beta, "none")
    emulator.check("softmax_nll_backward", grad[:, 0], *arguments, loosen=4)


def nll_options(case: Cases, classes: int) -> Callable[[float, str], tuple[Any, ...]]:
    """The arguments of softmax_nll behind its target."""
    weight = None
    if case.random.random() < 0.4:
        weight = torch.rand(classes, generator=case.generator, dtype=torch.float64)
        weight = weight.to(torch.float64 if case.dtype is torch.float64 else torch.float32)
    smoothing, ignored = case.choice(0.0, 0.0, 0.3), case.choice(-100, -100, -2)
    return lambda beta, reduction: (weight, beta, reduction, ignored, smoothing)


@cases(16)
def test_softmax_nll(emulator: Emulator, case: Cases):
    shape, dim = softmax_shape(case)
    if not shape:
        shape = [5]
    class_dim = 0 if len(shape) == 1 else 1
    shape[class_dim], shape[dim] = shape[dim], shape[class_dim]  # the long one
    classes = shape[class_dim] = max(shape[class_dim], 1)
    x = scores(case, shape)
    others = [size for d, size in enumerate(shape) if d != class_dim]
    target = torch.randint(classes, others, generator=case.generator)
    target = placed(target, case.choice("contiguous", "transposed", "spaced"))
    beta = case.choice(1.0, -0.7, 2.5)
    options = nll_options(case, classes)
    if case.random.random() < 0.4:  # some are left out
        target.masked_fill_(torch.rand(others, generator=case.generator) < 0.3, options(1.0, "")[3])
    elif case.random.random() < 0.3:
        target = torch.rand(shape, generator=case.generator, dtype=torch.float64).to(case.dtype)
        target = placed(target, case.choice(*LAYOUTS))
    loss = emulator.check("softmax_nll", x, target, *options(beta, "none"), loosen=4)
    grad = case.normal(others)
    nothing = torch.ones(0)
    expected = emulator.check(
        "softmax_nll_backward", grad, x, target, nothing, *options(beta, "none"), loosen=8
    )

    if loss.numel() == 0:
        return
    for reduction in ("mean", "sum"):
        emulator.check("softmax_nll", x, target, *options(beta, reduction), loosen=8)
        total = torch.ops.mnist_ops.softmax_nll(x, target, *options(beta, reduction))[1]
        arguments = x, target, total, *options(beta, reduction)
        emulator.check("softmax_nll_backward", case.normal([]), *arguments, loosen=8)
    if target.is_floating_point():
        return
    # A target that is no class: NaN for it alone, where the CPU refuses the whole call.
    wrong = target.clone()
    wrong[(0,) * wrong.dim()] = case.choice(-1, classes, 2**40, -(2**63))
    wrong_loss, _ = emulator("softmax_nll", x, wrong, *options(beta, "none"))
    assert wrong_loss[(0,) * wrong.dim()].isnan()
    close(wrong_loss.reshape(-1)[1:], loss.reshape(-1)[1:], x, 4)
    (gradient,) = emulator("softmax_nll_backward", grad, x, wrong, nothing, *options(beta, "none"))
    rows, expected_rows = (
        t.movedim(class_dim, -1).reshape(-1, classes) for t in (gradient, expected)
    )
    assert rows[0].isnan().all()
    close(rows[1:], expected_rows[1:], grad, 8)


@cases(2)
def test_the_sum_of_many_losses(emulator: Emulator, case: Cases):
    """Short rows, added up by several blocks of the kernel; others, by several of the next."""
    for shape in ([2100, 5], [9000, 8]):
        x = case.normal(shape)
        target = torch.randint(-1, 5, shape[:1], generator=case.generator)
        for reduction in ("mean", "sum"):
            arguments = x, target, None, 1.0, reduction, -1, 0.0
            emulator.check("softmax_nll", *arguments, loosen=8)


def test_local_normalization_divides_by_subnormal_values(emulator: Emulator):
    """A threshold_value whose reciprocal float32 does not hold."""
    x = torch.linspace(-2, 2, 3 * 8 * 8).reshape(1, 3, 8, 8) * 1e-37
    kernel = torch.tensor([1.0, 2.0, 1.0])
    for value in (1e-39, 2.9387358770557188e-39, 3e-39, 1e-38):
        (y,) = emulator("divisive_norm2d", x, kernel, 1.0, value)
        expected = x.double() / torch.tensor(value).double()
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=0)
