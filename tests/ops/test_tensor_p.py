"""LP pooling with p in a tensor, which has a gradient of its own."""

from __future__ import annotations

import math

import loops
import pytest
import torch
import torch.nn.functional as F
from conftest import thinned
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import mnist_ops
from mnist_ops import lp_pool1d, lp_pool2d, lp_pool3d, nn

WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0), "ceil_mode": True},
    {"kernel_size": (5, 7)},  # one window of each plane
    {"kernel_size": (4, 6), "stride": 1},
]
windows = pytest.mark.parametrize("options", WINDOWS, ids=str)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def powers(device: str, dtype: torch.dtype = torch.float64, **options) -> torch.Tensor:
    return torch.tensor([0.7, 2.0, 3.5], dtype=dtype, device=device, **options)


def images(device: str, dtype: torch.dtype = torch.float64, **options) -> torch.Tensor:
    return torch.randn(2, 3, 5, 7, dtype=dtype, device=device, **options)


@windows
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_loops(device, options, layout, dtype):
    x, p = images(device, dtype), powers(device, dtype)
    y = lp_pool2d(x.to(memory_format=layout), p, **options)
    rtol = 1e-12 if dtype is torch.float64 else 1e-5
    for c in range(3):
        expected = loops.lp_pool2d(x[:, c : c + 1].cpu(), p[c].item(), **options)
        torch.testing.assert_close(
            y[:, c : c + 1].cpu().double(), expected, rtol=rtol, atol=1e-6 * rtol
        )


@windows
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_mean_equals_the_composition(device, options, layout):
    """The one that everyone copies, value and gradients, where its powers are in range."""
    x = images(device).abs().add(0.1).to(memory_format=layout).requires_grad_()
    p = powers(device, requires_grad=True)
    options = {"stride": None, "padding": 0, "ceil_mode": False, **options}
    y = lp_pool2d(x, p, **options, average=True)
    column = p[:, None, None]
    mean = F.avg_pool2d(x.pow(column), **options, count_include_pad=False)
    expected = mean.pow(1 / column)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(t, (x, p), grad) for t in (y, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("options", "average"), thinned(WINDOWS, (False, True)))
def test_derivatives_of_both_orders_in_both_modes(device, options, average):
    x = images(device)[:1, :2].requires_grad_()
    p = powers(device)[1:].requires_grad_()

    def pool(x, p):
        return lp_pool2d(x, p, **options, average=average)

    assert gradcheck(pool, (x, p), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(pool, (x, p), check_fwd_over_rev=True)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("average", [False, True])
def test_gradients_do_not_depend_on_the_magnitude(device, scale, average):
    """Powers of these pixels, and of their sums, are beyond float32."""
    p = torch.tensor([3.0, 40.0], device=device, requires_grad=True)
    unit = torch.rand(1, 2, 6, 6, device=device) + 0.1
    wide = unit.double().requires_grad_()
    expected = torch.autograd.grad(
        lp_pool2d(wide, p.double(), 3, average=average).sum(), (wide, p), create_graph=False
    )
    x = (unit * scale).requires_grad_()
    by_x, by_p = torch.autograd.grad(lp_pool2d(x, p, 3, average=average).sum(), (x, p))
    torch.testing.assert_close(by_x, expected[0].float(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(by_p / scale, expected[1], rtol=2e-5, atol=1e-6)


def mean_gradient_of_p(windows: torch.Tensor, p: float) -> torch.Tensor:
    """dy/dp of the mean over the last dimension, by its series in p, of magnitudes > 0.

    ln y = sum over k of cumulant(k) p^(k-1) / k!, with the cumulants of ln x.
    """
    logs = windows.double().log()
    mean = logs.mean(-1)
    second, third, fourth = (((logs - mean[..., None]) ** k).mean(-1) for k in (2, 3, 4))
    rate = second / 2 + third * p / 3 + (fourth - 3 * second**2) * p**2 / 8
    log_y = mean + second * p / 2 + third * p**2 / 6
    return log_y.exp() * rate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [2, 12])
@pytest.mark.parametrize("p", [1e-2, 1e-3, 1e-4])
def test_gradient_of_a_small_p(device, dtype, layout, size, p):
    """It loses no more digits than y itself, whose root has 1 / p times the error of what it is of.

    Batches of windows, and windows one after the other; both modes, and PyTorch's own operators.
    """
    x = (torch.rand(1, 3, 12, 12, device=device) + 0.5).to(dtype).to(memory_format=layout)
    leaf = torch.tensor(p, dtype=dtype, device=device, requires_grad=True)
    expected = mean_gradient_of_p(F.unfold(x, size, stride=size).unflatten(1, (3, -1)).mT, p).sum()
    tolerance = 20 * torch.finfo(dtype).eps / p + p**3
    close = {"rtol": tolerance, "atol": 0, "check_dtype": False}
    (ours,) = torch.autograd.grad(lp_pool2d(x, leaf, size, average=True).sum(), leaf)
    torch.testing.assert_close(ours, expected, **close)
    _, tangent = torch.func.jvp(
        lambda t: lp_pool2d(x, t, size, average=True).sum(),
        (leaf.detach(),),
        (torch.ones_like(leaf.detach()),),
    )
    torch.testing.assert_close(tangent, expected, **close)


def test_zeros_of_the_image_count_in_the_gradient_of_the_mean(device):
    """And those around it do not."""
    x = torch.rand(1, 2, 6, 6, dtype=torch.float64, device=device)
    x[..., ::2] = 0
    x[0, 1, :3] = 0
    for p in (0.3, 3.0):
        leaf = torch.full((2,), p, dtype=torch.float64, device=device, requires_grad=True)
        for options in ((3, 2, 1), (6, 1, 3), (6,)):
            assert gradcheck(lambda t, o=options: lp_pool2d(x, t, *o, average=True), leaf)


def test_one_p_for_all_channels(device):
    x, p = images(device), torch.tensor(2.5, dtype=torch.float64, device=device)
    torch.testing.assert_close(lp_pool2d(x, p, 2), lp_pool2d(x, 2.5, 2))
    p.requires_grad_()
    assert gradcheck(lambda p: lp_pool2d(x, p, 2), p)
    torch.testing.assert_close(lp_pool2d(x[0], p, 2), lp_pool2d(x, p, 2)[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_p_of_infinity_is_the_maximum(device, layout):
    x = images(device, torch.float32).round().to(memory_format=layout).requires_grad_()
    p = torch.full((3,), math.inf, device=device)
    for average in (False, True):
        y = lp_pool2d(x, p, 3, 2, 1, average=average)
        expected = lp_pool2d(x, math.inf, 3, 2, 1)
        torch.testing.assert_close(y, expected)
        ours, theirs = (torch.autograd.grad(t.sum(), x) for t in (y, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("power", [0.5, 2.5])
def test_zeros_infinity_and_nan_stay_in_their_windows(device, size, power):
    x = torch.zeros(1, 1, 12, 12, device=device)
    x[..., :6, 6:] = math.nan
    x[..., 6:, :6] = math.inf
    x[..., 7::2, :6:2] = 3.0  # beside an infinity
    x[..., 6:, 6:] = 1.0
    x.requires_grad_()
    p = torch.tensor(power, device=device, requires_grad=True)
    y = lp_pool2d(x, p.detach(), size)
    cut = y.shape[-1] // 2
    assert (y[..., :cut, :cut] == 0).all() and y[..., :cut, cut:].isnan().all()
    assert (y[..., cut:, :cut] == math.inf).all() and y[..., cut:, cut:].isfinite().all()
    (by_x,) = torch.autograd.grad(y.sum(), x)
    assert (by_x[..., :6, :6] == 0).all() and by_x[..., 6:, 6:].isfinite().all()
    assert (by_x[..., 7::2, :6:2] == 0).all() and by_x[..., 6::2, :6].isnan().all()
    zeros = torch.zeros(1, 1, 12, 12, device=device)
    (by_p,) = torch.autograd.grad(lp_pool2d(zeros, p, size).sum(), p)
    assert by_p == 0
    wrong = torch.tensor(-1.0, device=device)
    assert lp_pool2d(x, wrong, size).isnan().all()


def test_the_sum_of_the_gradient_of_p_does_not_depend_on_threads():
    x = torch.randn(7, 3, 40, 50)
    for layout in LAYOUTS:
        for options in ((2,), (3, 1, 1), (30,)):
            gradients = []
            before = torch.get_num_threads()
            for threads in (1, 3):
                torch.set_num_threads(threads)
                p = powers("cpu", torch.float32, requires_grad=True)
                leaf = x.to(memory_format=layout).requires_grad_()
                y = lp_pool2d(leaf, p, *options)
                gradients.append(torch.autograd.grad(y.pow(2).sum(), (leaf, p)))
            torch.set_num_threads(before)
            for one, other in zip(*gradients, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_half_types_round_once(device, dtype, layout):
    p = powers(device, torch.float32, requires_grad=True)
    for options in WINDOWS:
        x = images(device, dtype).to(memory_format=layout).requires_grad_()
        wide = x.detach().float().requires_grad_()
        y, expected = (lp_pool2d(t, p, **options) for t in (x, wide))
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)
        grad = torch.randn_like(y)
        ours = torch.autograd.grad(y, (x, p), grad)
        theirs = torch.autograd.grad(expected, (wide, p), grad.float())
        torch.testing.assert_close(ours[0], theirs[0].to(dtype), rtol=0, atol=0)
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0)


def test_dilation_and_padding_by_sides(device):
    x, p = images(device), powers(device, requires_grad=True)
    for options in ({"dilation": 2}, {"padding": ((0, 1), (2, 0))}):
        y = lp_pool2d(x, p, 2, **options)
        for c in range(3):
            expected = lp_pool2d(x[:, c : c + 1], p[c].item(), 2, **options)
            torch.testing.assert_close(y[:, c : c + 1], expected)


@pytest.mark.parametrize("by_channel", [False, True])
def test_sequences_and_volumes(device, by_channel):
    p = powers(device) if by_channel else torch.tensor(2.5, dtype=torch.float64, device=device)
    p.requires_grad_()
    sequences = torch.randn(2, 3, 9, dtype=torch.float64, device=device)
    volumes = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, device=device)
    for pool, x in ((lp_pool1d, sequences), (lp_pool3d, volumes)):
        y = pool(x, p, 3, 2, 1)
        each = p.expand(3)
        for c in range(3):
            expected = pool(x[:, c : c + 1], each[c].item(), 3, 2, 1)
            torch.testing.assert_close(y[:, c : c + 1], expected)
        assert gradcheck(lambda p, x=x, pool=pool: pool(x, p, 3, 2, 1), p)


def test_vmap_over_images_and_p(device):
    x = torch.randn(4, 2, 3, 5, 7, dtype=torch.float64, device=device)
    p = torch.rand(4, 3, dtype=torch.float64, device=device) + 1

    def pool(x, p):
        return lp_pool2d(x, p, 2, 1)

    def loss(x, p):
        return pool(x, p).pow(2).sum()

    for in_dims, args in (((0, 0), (x, p)), ((0, None), (x, p[0])), ((None, 0), (x[0], p))):
        pick = [lambda t, j, d=d: t if d is None else t[j] for d in in_dims]
        each = [[f(t, j) for f, t in zip(pick, args, strict=True)] for j in range(4)]
        y = torch.func.vmap(pool, in_dims)(*args)
        torch.testing.assert_close(y, torch.stack([pool(*one) for one in each]))
        grads = torch.func.vmap(torch.func.grad(loss, (0, 1)), in_dims)(*args)
        expected = [torch.func.grad(loss, (0, 1))(*one) for one in each]
        for i in range(2):
            torch.testing.assert_close(grads[i], torch.stack([e[i] for e in expected]))


def test_hessian_of_p(device):
    x, p = images(device), powers(device)

    def loss(p):
        return lp_pool2d(x, p, 3, average=True).pow(3).sum()

    hessian = torch.func.hessian(loss)(p)
    leaf = p.clone().requires_grad_()
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, leaf))
    step = 1e-5 * torch.eye(3, dtype=torch.float64, device=device)
    gradient = torch.func.grad(loss)
    expected = torch.stack([(gradient(p + e) - gradient(p - e)) / 2e-5 for e in step])
    torch.testing.assert_close(hessian, expected, rtol=1e-6, atol=1e-6)


def test_tangent_of_a_gradient(device):
    x, p, direction = images(device), powers(device), powers(device)
    grad = torch.randn(2, 3, 2, 3, dtype=torch.float64, device=device)
    operator = torch.ops.mnist_ops.lp_pool2d_tensor_p_backward
    rest = ([2, 2], [2, 2], [0, 0], False, False)
    with forward_ad.dual_level():
        results = operator(grad, x, forward_ad.make_dual(p, direction), *rest)
        tangents = [forward_ad.unpack_dual(r).tangent for r in results]
    ahead, behind = (operator(grad, x, p + h * direction, *rest) for h in (1e-6, -1e-6))
    for tangent, a, b in zip(tangents, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (a - b) / 2e-6, rtol=1e-6, atol=1e-6)


def test_compiled(device):
    torch.compiler.reset()
    gem = nn.GeM2d(powers(device, torch.float32)).to(device)
    x = torch.rand(2, 3, 8, 8, device=device)
    compiled = torch.compile(gem, fullgraph=True, backend="aot_eager")
    ours, theirs = (f(x).sum() for f in (compiled, gem))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    one, other = (torch.autograd.grad(t, gem.p) for t in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gem_with_a_p_for_each_channel(device):
    gem = nn.GeM2d(powers("cpu", torch.float32)).to(device)
    x = torch.rand(2, 3, 5, 7, device=device) + 0.1
    for c, p in enumerate((0.7, 2.0, 3.5)):
        torch.testing.assert_close(gem(x)[:, c], nn.GeM2d(p, learnable=False)(x)[:, c])
    assert repr(gem) == "GeM2d(p=a tensor (3,), learnable=True, eps=1e-06)"
    fixed = nn.GeM2d(powers("cpu"), learnable=False)
    assert list(fixed.state_dict()) == ["p"] and not list(fixed.parameters())
    with pytest.raises(ValueError, match="GeM2d: p must be > 0"):
        nn.GeM2d(torch.tensor([1.0, -1.0]))
    with pytest.raises(TypeError, match="GeM2d: p must be floating-point, got"):
        nn.GeM2d(torch.tensor([1, 2]))
    for p in (2.0, torch.tensor([2.0, 3.0])):
        assert "p=a tensor (" in repr(nn.GeM2d(p).to("meta"))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_modules_hold_p(device, dims, learned, shape):
    """A parameter is learned; another tensor is a buffer; both are in the state."""
    make = (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)[dims - 1]
    function = (lp_pool1d, lp_pool2d, lp_pool3d)[dims - 1]
    p = 2 + torch.rand(shape)
    module = make(torch.nn.Parameter(p) if learned else p, 2, dilation=2).to(device)
    names = [name for name, _ in module.named_parameters()]
    assert names == (["norm_type"] if learned else [])
    other = make(torch.ones(shape), 2, dilation=2).to(device)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 3, *[5] * dims, device=device)
    y = module(x)
    torch.testing.assert_close(y, function(x, p.to(device), 2, dilation=2), rtol=0, atol=0)
    torch.testing.assert_close(y, other(x), rtol=0, atol=0)
    graph = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(y, graph(x), rtol=0, atol=0)
    if learned:
        y.sum().backward()
        assert module.norm_type.grad.shape == shape and module.norm_type.grad.abs().min() > 0
    shown = "a tensor (3,)" if shape else f"{p.item():g}"
    assert repr(module).startswith(f"LPPool{dims}d(norm_type={shown}, kernel_size=2, stride=2, ")


def test_modules_refuse_what_is_no_p():
    for make in (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d):
        name = make.__name__
        with pytest.raises(TypeError, match=f"{name}: norm_type must be floating-point"):
            make(torch.tensor(2), 2)
        with pytest.raises(ValueError, match=f"{name}: norm_type must be > 0"):
            make(torch.tensor([2.0, -1.0]), 2)
        with pytest.raises(ValueError, match=f"{name}: norm_type .* finite to be learned, got"):
            make(torch.nn.Parameter(torch.tensor(math.inf)), 2)


@pytest.mark.parametrize(
    ("norm_type", "error", "message"),
    [
        (torch.tensor([2, 3, 4]), TypeError, "norm_type must be floating-point, got torch.int64"),
        (torch.ones(4), ValueError, r"one for each of 3 channels, got the shape \(4,\)"),
        (torch.ones(3, 1), ValueError, r"one for each of 3 channels, got the shape \(3, 1\)"),
        (torch.ones(3, device="meta"), RuntimeError, "norm_type is on meta and input on cpu"),
    ],
)
def test_errors(norm_type, error, message):
    for pool, x in (
        (lp_pool2d, images("cpu")),
        (lp_pool1d, images("cpu")[:, :, 0]),
        (lp_pool3d, images("cpu")[:, :, None]),
    ):
        size = 1 if pool is lp_pool3d else 2
        with pytest.raises(error, match=f"{pool.__name__}: .*{message}"):
            pool(x, norm_type, size)


@pytest.mark.parametrize(
    ("norm_type", "message"),
    [
        (torch.ones(4), "norm_type must have one element for each of 3 channels"),
        (torch.ones(()), "norm_type must have one element for each of 3 channels"),
        (torch.ones(3, dtype=torch.float64), "norm_type must have the dtype Float"),
    ],
)
def test_errors_of_the_operators(norm_type, message):
    x, rest = images("cpu", torch.float32), ([2, 2], [2, 2], [0, 0], False, False)
    y = torch.ones(2, 3, 2, 3)
    with pytest.raises(RuntimeError, match=f"^lp_pool2d_tensor_p: {message}"):
        torch.ops.mnist_ops.lp_pool2d_tensor_p(x, norm_type, *rest)
    with pytest.raises(RuntimeError, match=f"^lp_pool2d_tensor_p_backward: {message}"):
        torch.ops.mnist_ops.lp_pool2d_tensor_p_backward(y, x, norm_type, *rest)
    with pytest.raises(RuntimeError, match="grad_output must have the shape"):
        torch.ops.mnist_ops.lp_pool2d_tensor_p_backward(None, x, torch.ones(3), *rest)


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7)], ids=str)
def test_images_of_nothing(device, shape):
    x = torch.ones(shape, device=device, requires_grad=True)
    p = torch.full(shape[1:2], 2.0, device=device, requires_grad=True)
    y = mnist_ops.lp_pool2d(x, p, 2, padding=1)
    assert (y == 0).all()
    by_x, by_p = torch.autograd.grad(y.sum(), (x, p))
    assert by_x.shape == shape and (by_p == 0).all()
