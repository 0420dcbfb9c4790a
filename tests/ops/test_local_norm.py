"""Local normalization against loops and the original system's vectors."""

from __future__ import annotations

import loops
import numpy as np
import pytest
import torch
from conftest import REFERENCE, thinned, torch7_cases, torch7_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import mnist_ops
from mnist_ops import gaussian1d, gaussian2d

FUNCTIONS = ["subtractive_norm2d", "divisive_norm2d", "contrastive_norm2d"]
KERNELS = {
    "gaussian1d(3)": gaussian1d(3),
    "gaussian1d(7)": gaussian1d(7),
    "one tap": torch.ones(1, dtype=torch.float64),
    "asymmetric 5": torch.tensor([0.1, 0.7, 1.0, 0.3, 0.2], dtype=torch.float64),
    "asymmetric 3x5": torch.arange(1.0, 16.0, dtype=torch.float64).reshape(3, 5),
    "larger than the image": torch.ones(11, 9, dtype=torch.float64),
}
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def options(name: str, **thresholds: float) -> dict[str, float]:
    return {} if name == "subtractive_norm2d" else thresholds


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_loops(device, name, kernel, dtype):
    # The inner threshold makes some pixels be divided by s and some by the value.
    thresholds = options(name, threshold=0.9, threshold_value=1.5)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).to(dtype)
    x[1, :, :3] *= 0.125
    expected = getattr(loops, name)(x, kernel, **thresholds)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = getattr(mnist_ops, name)(
            x.to(device).to(memory_format=layout), kernel.to(device), **thresholds
        )
        assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(
            y.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize(
    ("name", "kernel", "threshold", "layout"),
    thinned(
        FUNCTIONS, KERNELS, (1e-4, 0.95), (torch.contiguous_format, torch.channels_last), keep=4
    ),
)
def test_gradients(device, name, kernel, threshold, layout):
    function, thresholds = getattr(mnist_ops, name), options(name, threshold=threshold)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, device=device)
    leaf = x.contiguous(memory_format=layout).requires_grad_()
    weights = KERNELS[kernel].to(device)

    def normalize(t):
        return function(t, weights, **thresholds)

    assert gradcheck(normalize, (leaf,))
    assert gradgradcheck(normalize, (leaf,))
    (grad,) = torch.autograd.grad(normalize(leaf).pow(3).sum(), leaf)
    assert grad.is_contiguous(memory_format=layout)


def test_third_derivative(device):
    kernel = gaussian1d(3).to(device)
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    for name in FUNCTIONS:

        def gradient_sum(t):
            y = getattr(mnist_ops, name)(t, kernel)
            (grad,) = torch.autograd.grad(y.pow(3).sum(), t, create_graph=True)
            return grad

        assert gradgradcheck(gradient_sum, (x,)), name


@pytest.mark.parametrize("case", torch7_cases("normalization"), ids=lambda case: case["name"])
def test_equals_torch7(device, case):
    name = {
        "nn.SpatialSubtractiveNormalization": "subtractive_norm2d",
        "nn.SpatialDivisiveNormalization": "divisive_norm2d",
        "nn.SpatialContrastiveNormalization": "contrastive_norm2d",
    }[case["class"]]
    x = torch7_tensor(case["input"]).to(device).requires_grad_()
    kernel = torch7_tensor(case["kernel_given"]).to(device)
    y = getattr(mnist_ops, name)(x, kernel, *map(float, case["extra"]))
    (grad,) = torch.autograd.grad(y, x, torch7_tensor(case["gradOutput"]).to(device))
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-6
    for ours, theirs in ((y, "output"), (grad, "gradInput")):
        torch.testing.assert_close(
            ours.detach().cpu(), torch7_tensor(case[theirs]), rtol=0, atol=tolerance
        )


def test_the_original_images_bit_for_bit():
    """The reports' preprocessing in float32: the same bits as the original system's images."""
    reference = np.load(REFERENCE / "online_original.npz")
    from mnist_ops.mnist import data

    images, _ = data.load("train")
    x = torch.nn.functional.pad(images[:3], (2, 2, 2, 2)).float()
    x = (x - float(reference["mean"])) / float(reference["std"])
    y = mnist_ops.contrastive_norm2d(x, gaussian1d(7), 1.0, 1.0)
    assert torch.equal(y.double(), torch.from_numpy(reference["train_first3"]))


def test_what_the_formulas_promise(device):
    kernel = gaussian1d(5).to(device)
    constant = torch.full((1, 4, 9, 9), 3.0, dtype=torch.float64, device=device)
    assert mnist_ops.subtractive_norm2d(constant, kernel).abs().max() < 1e-14
    # No deviation: every pixel is divided by the value.
    y = mnist_ops.contrastive_norm2d(constant + 0.5, kernel, 0.1, 2.0)
    assert y.abs().max() < 1e-13
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64, device=device)
    # Divisive normalization forgets the scale where the deviation is above the threshold ...
    torch.testing.assert_close(
        mnist_ops.divisive_norm2d(x, kernel), mnist_ops.divisive_norm2d(7 * x, kernel)
    )
    # ... and the kernel's scale never counts.
    torch.testing.assert_close(
        mnist_ops.divisive_norm2d(x, kernel), mnist_ops.divisive_norm2d(x, 11 * kernel)
    )


def test_zero_image_has_no_nan(device):
    x = torch.zeros(1, 2, 5, 5, dtype=torch.float64, device=device, requires_grad=True)
    for name in FUNCTIONS:
        y = getattr(mnist_ops, name)(x, gaussian1d(3).to(device))
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert (y == 0).all() and grad.isfinite().all()
        if name != "subtractive_norm2d":  # linear: its gradient does not depend on x
            (second,) = torch.autograd.grad(grad.sum(), x)
            assert second.isfinite().all()


def test_nan_is_not_hidden_by_the_threshold(device):
    x = torch.zeros(1, 1, 7, 7, device=device)
    x[0, 0, 0, 0] = float("nan")
    for name in FUNCTIONS:
        y = getattr(mnist_ops, name)(x, gaussian1d(3).to(device))
        assert y[0, 0, 1, 1].isnan() and not y[0, 0, 5, 5].isnan()


# ---------------------------------------------------------------------------- thresholds of images


def image_thresholds(dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    """Of four images: all of their pixels are above the first, none above the last."""
    return torch.tensor([0.0, 0.6, 0.9, 50.0], dtype=dtype, device=device)


@pytest.mark.parametrize("name", FUNCTIONS[1:])
@pytest.mark.parametrize("kernel", ["gaussian1d(7)", "asymmetric 3x5"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_threshold_for_each_image(device, name, kernel, dtype):
    x, kernel = torch.randn(4, 3, 6, 5).to(dtype), KERNELS[kernel]
    thresholds = image_thresholds()
    loop, function = getattr(loops, name), getattr(mnist_ops, name)
    expected = torch.cat([loop(x[i : i + 1], kernel, thresholds[i].item()) for i in range(4)])
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for layout in (torch.contiguous_format, torch.channels_last):
        images = x.to(device).to(memory_format=layout)
        y = function(images, kernel.to(device), thresholds.to(device))
        assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y.cpu().double(), expected, **close)
    for i in range(4):
        for threshold in (thresholds[i].to(device), thresholds[i : i + 1].to(device)):
            y = function(x[i].to(device), kernel.to(device), threshold)
            torch.testing.assert_close(y.cpu().double(), expected[i], **close)
    one = function(x.to(device), kernel.to(device), thresholds[1].to(device))
    torch.testing.assert_close(one.cpu().double(), loop(x, kernel, 0.6), **close)
    assert function(x[:0].to(device), kernel, thresholds[:0].to(device)).shape == (0, 3, 6, 5)


@pytest.mark.parametrize("name", FUNCTIONS[1:])
def test_derivatives_by_thresholds_of_images(device, name):
    x = torch.randn(4, 2, 4, 3, dtype=torch.float64, device=device)
    x[:, :, :2] *= 0.1
    x.requires_grad_()
    kernel, function = gaussian1d(3).to(device), getattr(mnist_ops, name)
    t = image_thresholds(device=device).clamp(min=1e-3).requires_grad_()

    def normalize(x, t):
        return function(x, kernel, t)

    assert gradcheck(normalize, (x, t), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(normalize, (x, t), check_fwd_over_rev=True)
    # By each threshold: the sum over the pixels that it divides, of -x / t^2.
    y = normalize(x, t)
    grad = torch.randn_like(y)
    z = x if name == "divisive_norm2d" else mnist_ops.subtractive_norm2d(x, kernel)
    divides = torch.isclose(y * t[:, None, None, None], z)
    expected = -(grad * divides * z).sum((1, 2, 3)) / t**2
    torch.testing.assert_close(torch.autograd.grad(y, t, grad)[0], expected)
    assert 0 < divides[1:3].sum() < divides[1:3].numel()
    assert not divides[0].any() and divides[3].all()


def test_thresholds_of_images_on_the_meta_device():
    x, threshold = torch.ones(2, 3, 4, 4, device="meta"), torch.ones(2, device="meta")
    y = mnist_ops.divisive_norm2d(x, gaussian1d(3), threshold)
    assert y.is_meta and y.shape == x.shape


def test_a_threshold_of_zero_makes_no_nan(device):
    """The mean deviation of a black image."""
    x = torch.randn(2, 1, 5, 5, device=device)
    x[1] = 0
    x.requires_grad_()
    y = mnist_ops.contrastive_norm2d(x, gaussian1d(3), torch.zeros(2, device=device))
    torch.testing.assert_close(y[:1], mnist_ops.contrastive_norm2d(x[:1], gaussian1d(3), 1e-30))
    assert (y[1] == 0).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


def test_thresholds_of_images_in_transforms(device):
    x = torch.randn(4, 2, 6, 5, dtype=torch.float64, device=device)
    kernel, thresholds = gaussian1d(3).to(device), image_thresholds(device=device)

    def normalize(x, t):
        return mnist_ops.contrastive_norm2d(x, kernel, t)

    expected = normalize(x, thresholds)
    torch.testing.assert_close(torch.func.vmap(normalize)(x, thresholds), expected)
    torch.compiler.reset()
    for dynamic in (False, True):
        compiled = torch.compile(normalize, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(x, thresholds), expected)
    with torch.autocast(device, torch.bfloat16):
        number = mnist_ops.contrastive_norm2d(x.bfloat16(), kernel, 0.6)
        tensor = normalize(x.bfloat16(), thresholds[1])
    assert number.dtype == tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, number)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel": torch.ones(4)}, ValueError, r"kernel sizes must be odd, got \(4,\)"),
        ({"kernel": torch.ones(3, 2)}, ValueError, r"kernel sizes must be odd, got \(3, 2\)"),
        ({"kernel": torch.ones(0)}, ValueError, "kernel sizes must be odd"),
        ({"kernel": torch.ones(1, 3, 3)}, ValueError, "kernel must have 1 dimension"),
        ({"kernel": torch.ones(3, dtype=torch.int64)}, TypeError, "kernel must be float64"),
        ({"kernel": [1.0]}, TypeError, "kernel must be a Tensor"),
        (
            {"kernel": torch.ones(3, requires_grad=True)},
            ValueError,
            "kernel requires grad, but no gradient",
        ),
        ({"kernel": torch.zeros(3)}, RuntimeError, "sum must be finite and not 0"),
        ({"kernel": torch.tensor([-1.0, 2.0, -1.0])}, RuntimeError, "sum must be finite and not 0"),
        ({"input": torch.ones(4, 5)}, ValueError, "input must be"),
        ({"input": torch.ones(1, 4, 5).long()}, TypeError, "input must be float64"),
    ],
    ids=str,
)
def test_errors_name_the_argument(name, change, error, message):
    call = {"input": torch.ones(1, 4, 5), "kernel": torch.ones(3), **change}
    with pytest.raises(error, match=message):
        getattr(mnist_ops, name)(**call)


@pytest.mark.parametrize("name", FUNCTIONS[1:])
@pytest.mark.parametrize(
    ("thresholds", "error", "message"),
    [
        ((-1.0,), ValueError, "threshold must be >= 0 and finite, got -1.0"),
        ((float("nan"),), ValueError, "threshold must be >= 0"),
        ((0.0,), ValueError, "threshold_value must be > 0 and finite, got 0.0"),
        ((1.0, -2.0), ValueError, "threshold_value must be > 0"),
        (("1",), TypeError, "threshold must be a number, got str"),
    ],
    ids=str,
)
def test_errors_of_thresholds(name, thresholds, error, message):
    with pytest.raises(error, match=message):
        getattr(mnist_ops, name)(torch.ones(1, 4, 5), torch.ones(3), *thresholds)


@pytest.mark.parametrize("name", FUNCTIONS[1:])
@pytest.mark.parametrize(
    ("threshold", "value", "error", "message"),
    [
        (torch.ones(3), None, ValueError, r"one for each of 2 images, got the shape \(3,\)"),
        (torch.ones(1), None, ValueError, r"one for each of 2 images, got the shape \(1,\)"),
        (torch.ones(2, 1), None, ValueError, r"one for each of 2 images, got the shape \(2, 1\)"),
        (torch.ones(2).long(), None, TypeError, "threshold must be float64, .* got torch.int64"),
        (torch.ones(2, device="meta"), None, RuntimeError, "threshold is on meta and input on cpu"),
        (torch.ones(2), 1.0, ValueError, "threshold_value is not offered with a threshold in a"),
    ],
    ids=str,
)
def test_errors_of_thresholds_of_images(name, threshold, value, error, message):
    with pytest.raises(error, match=f"{name}: .*{message}"):
        getattr(mnist_ops, name)(torch.ones(2, 1, 4, 5), torch.ones(3), threshold, value)


def test_errors_of_the_registered_operators():
    ops = torch.ops.mnist_ops
    x, kernel = torch.ones(1, 4, 5), torch.ones(3)
    with pytest.raises(RuntimeError, match="kernel sizes must be odd"):
        ops.subtractive_norm2d(x, torch.ones(2))
    with pytest.raises(RuntimeError, match="threshold_value must be > 0"):
        ops.divisive_norm2d(x, kernel, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="no derivative for its kernel"):
        ops.subtractive_norm2d(x, torch.ones(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="grad_output must have the shape of input"):
        ops.contrastive_norm2d_backward(torch.ones(1, 4, 4), x, kernel, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="grad_output must have the dtype of input"):
        ops.divisive_norm2d_backward(x.double(), x, kernel, 1.0, 1.0)


# -------------------------------------------------------------------------------------- properties


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_and_kernel(data):
    draw = data.draw
    name = draw(st.sampled_from(FUNCTIONS))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    shape = [
        draw(st.integers(0, 3)),
        draw(st.integers(1, 5)),
        *(draw(st.integers(1, 8)) for _ in "HW"),
    ]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(*shape[::-1], generator=generator).to(dtype).permute(3, 2, 1, 0)
    taps = [2 * draw(st.integers(0, 4)) + 1 for _ in range(draw(st.integers(1, 2)))]
    kernel = torch.rand(taps, generator=generator) + 0.1
    thresholds = options(name, threshold=0.5, threshold_value=0.75)
    y = getattr(mnist_ops, name)(x, kernel, **thresholds)
    assert y.shape == x.shape
    if x.numel():
        expected = getattr(loops, name)(x, kernel, **thresholds)
        # Next to the threshold rounding decides which branch is taken: leave those pixels out.
        sure = torch.ones(len(x), 1, *shape[2:], dtype=torch.bool)
        if thresholds:
            z = x if name == "divisive_norm2d" else loops.subtractive_norm2d(x, kernel)
            coef = loops.correlate(torch.ones(shape[2:], dtype=torch.float64), kernel)
            s = torch.stack([loops.correlate((i.double() ** 2).mean(0), kernel) for i in z])
            sure = ((s.sqrt() / coef - 0.5).abs() > 1e-5)[:, None]
        close = torch.isclose(
            y.double(), expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype]
        )
        assert (close | ~sure).all()
        assert sure.double().mean() > 0.5


def test_modules_are_the_functions(device):
    x = torch.randn(2, 3, 8, 8, device=device)
    nn = mnist_ops.nn
    for module, expected in (
        (nn.SubtractiveNorm2d(gaussian1d(5)), mnist_ops.subtractive_norm2d(x, gaussian1d(5))),
        (nn.DivisiveNorm2d(gaussian2d(5), 0.5), mnist_ops.divisive_norm2d(x, gaussian2d(5), 0.5)),
        (
            nn.ContrastiveNorm2d(gaussian1d(5), 0.5, 2.0),
            mnist_ops.contrastive_norm2d(x, gaussian1d(5), 0.5, 2.0),
        ),
    ):
        module = module.to(device)
        assert torch.equal(module(x), expected)
        assert "kernel_size=(5," in repr(module)


def test_module_kernel_survives_casts():
    module = mnist_ops.nn.SubtractiveNorm2d(gaussian1d(7))
    assert list(module.state_dict()) == ["kernel"] and list(module.parameters()) == []
    for cast in (module.half(), module.float(), module.to(torch.bfloat16), module.double()):
        assert cast.kernel.dtype == torch.float64
        assert torch.equal(cast.kernel, gaussian1d(7))
    assert module.to("meta").kernel.device.type == "meta"
    given_kernel = gaussian1d(7)
    module = mnist_ops.nn.SubtractiveNorm2d(given_kernel)
    given_kernel.zero_()
    assert torch.equal(module.kernel, gaussian1d(7))
    with pytest.raises(ValueError, match="sum must be finite and not 0"):
        mnist_ops.nn.SubtractiveNorm2d(torch.zeros(3))
    with pytest.raises(ValueError, match="kernel sizes must be odd"):
        mnist_ops.nn.ContrastiveNorm2d(torch.ones(2))
    with pytest.raises(ValueError, match="ContrastiveNorm2d: threshold_value must be > 0"):
        mnist_ops.nn.ContrastiveNorm2d(torch.ones(3), 0.0)


# ----------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("entry", torch7_cases("kernels"))
def test_gaussians_equal_torch7(entry):
    dimensions, size = entry.removeprefix("gaussian").split("D_")
    make = gaussian1d if dimensions == "1" else gaussian2d
    expected = torch7_tensor(torch7_cases("kernels")[entry])
    tolerance = 1e-15 if dimensions == "1" else 1e-7
    torch.testing.assert_close(make(int(size)), expected, rtol=0, atol=tolerance)


def test_gaussian_arguments():
    assert gaussian1d(5, normalize=True).sum().item() == pytest.approx(1)
    assert gaussian2d((3, 5), normalize=True).sum().item() == pytest.approx(1)
    assert gaussian2d((3, 5)).shape == (3, 5)
    assert gaussian1d(7, amplitude=3).max().item() == 3
    assert gaussian2d(7, amplitude=3).max().item() == 3
    assert gaussian1d(8, center=1 / 16).argmax().item() == 0
    assert gaussian1d(9, sigma=10).min() > 0.99
    for bad, error in (
        ({"size": 0}, ValueError),
        ({"size": 2.5}, TypeError),
        ({"size": 3, "sigma": 0}, ValueError),
        ({"size": 3, "amplitude": "1"}, TypeError),
    ):
        with pytest.raises(error, match="gaussian1d: "):
            gaussian1d(**bad)


# ------------------------------------------------------------------------------------------- range


@pytest.mark.parametrize("name", FUNCTIONS[1:])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_images_of_any_magnitude(device, name, channels, layout, dtype):
    generator = torch.Generator().manual_seed(5)
    kernel = torch.tensor([0.2, 0.7, 1.0, 0.6, 0.3], dtype=torch.float64)
    image = torch.randn(3, channels, 9, 8, generator=generator, dtype=torch.float64)
    image[1, :, :, :3] = 0
    grad = torch.randn(3, channels, 9, 8, generator=generator, dtype=torch.float64)
    factors = [1e-30, 1e-22, 1e-16, 1e-10, 1.0, 1e10, 1e16, 1e20, 1e30]
    if dtype == torch.float64:
        factors += [1e-250, 1e-200, 1e-120, 1e120, 1e200, 1e250, 1e300]
    for factor in factors:
        for threshold, value in ((0.0, 1.0), (1e-4, 1e-4), (1e20, 1e20)):
            x = (image * factor).to(dtype)
            x[2, 0, 4, 4] *= 1e6  # one huge pixel
            x = x.to(memory_format=layout)
            g = grad.to(dtype)
            leaf = x.clone().to(device).requires_grad_()
            y = getattr(mnist_ops, name)(leaf, kernel.to(device), threshold, value)
            (gx,) = torch.autograd.grad(y, leaf, g.to(device))
            expected = loops.norm_in_long_double(name, x, kernel, threshold, value, g)
            loops.assert_close_at_any_scale(y.detach(), expected[0], 8 * TOLERANCE[dtype])
            loops.assert_close_at_any_scale(gx, expected[1], 8 * TOLERANCE[dtype])


def _in_pytorch(name, x, kernel, threshold, value):
    """The formulas in float64 and PyTorch's operators, for its own derivatives."""
    unit = torch.outer(kernel, kernel) / kernel.sum() ** 2

    def blur(images):
        sums = images.sum(1, keepdim=True) / images.shape[1]
        return torch.nn.functional.conv2d(sums, unit[None, None], padding=len(kernel) // 2)

    coef = blur(torch.ones_like(x))
    if name == "contrastive_norm2d":
        x = x - blur(x) / coef
    energy = blur(x * x)
    s = torch.where(energy > 0, energy, 1).sqrt() * (energy > 0) / coef
    return x / torch.where(s > threshold, s, value)


def _second_derivatives(function, x, g, v):
    leaf, grad = x.clone().requires_grad_(), g.clone().requires_grad_()
    (grad_x,) = torch.autograd.grad(function(leaf), leaf, grad, create_graph=True)
    tangent = torch.func.jvp(function, (x,), (v,))[1]
    of_gradient = torch.func.jvp(lambda t: torch.func.vjp(function, t)[1](g)[0], (x,), (v,))[1]
    return *torch.autograd.grad(grad_x, (grad, leaf), v), tangent, of_gradient


@pytest.mark.parametrize("name", FUNCTIONS[1:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_second_derivatives_of_images_of_any_magnitude(device, name, dtype, threshold):
    """Forward mode and double backward of x, g and v times c are those of x, g and v."""
    generator = torch.Generator().manual_seed(5)
    kernel = gaussian1d(3)
    x, g, v = (torch.randn(3, 2, 7, 9, generator=generator).double() for _ in "xgv")
    x[1, :, :, :4] = 0
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    for huge in (1.0, 1e6, 1e15, 1e30):
        x[2, 0, 3, 3] = huge
        reference = _second_derivatives(
            lambda t: _in_pytorch(name, t, kernel, threshold, 0.5), x, g, v
        )
        exponents = [-73, 0, 66] if dtype == torch.float32 else [-830, -664, 0, 500, 664, 830]
        for c in (2.0**e for e in exponents):
            if huge * c > torch.finfo(dtype).max:
                continue
            ours = _second_derivatives(
                lambda t: getattr(mnist_ops, name)(t, kernel.to(device), threshold * c, 0.5 * c),
                *((t * c).to(dtype).to(device) for t in (x, g, v)),
            )
            for actual, expected in zip(ours, reference, strict=True):
                error = (actual.detach().cpu().double() - expected).abs().amax((1, 2, 3))
                assert (error <= tolerance * expected.abs().amax((1, 2, 3))).all(), (huge, c)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sums_of_channels_near_the_end_of_the_range(name):
    for dtype, largest in ((torch.float32, 3e38), (torch.float64, 1.5e308)):
        x = torch.full((1, 5, 4, 4), largest, dtype=dtype)
        x[0, 1] /= 2
        y = getattr(mnist_ops, name)(x, gaussian1d(3))
        small = getattr(mnist_ops, name)(x / largest, gaussian1d(3))
        if name == "subtractive_norm2d":
            small = small * largest
        torch.testing.assert_close(y, small, rtol=1e-5, atol=0)


def test_a_gradient_of_any_magnitude():
    x = torch.randn(1, 2, 6, 6)
    for name in FUNCTIONS:
        for scale in (1e-36, 1e-30, 1e30, 1e36):
            leaf = x.clone().requires_grad_()
            y = getattr(mnist_ops, name)(leaf, gaussian1d(3))
            (unit,) = torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)
            (grad,) = torch.autograd.grad(y, leaf, torch.full_like(y, scale))
            difference = (grad.double() / scale - unit.double()).abs().max()
            assert difference < 1e-5 * unit.abs().max() + 1e-6
