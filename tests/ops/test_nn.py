"""Modules: what they keep, save and refuse."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import mnist_ops
from mnist_ops import gaussian1d, nn
from mnist_ops.mnist import models

NORMS = [
    nn.SubtractiveNorm2d,
    lambda kernel: nn.DivisiveNorm2d(kernel, 0.1),
    lambda kernel: nn.ContrastiveNorm2d(kernel, 0.1),
    lambda kernel: nn.Stage2d(kernel, "tanh"),
]
IDS = ["subtractive", "divisive", "contrastive", "stage"]


def images():
    return torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", NORMS, ids=IDS)
def test_a_kernel_outlives_to_empty(make):
    """Memory of the meta device and of to_empty holds nothing; the kernel is restored."""
    expected = make(gaussian1d(5))(images())
    for norm in (make(gaussian1d(5)).to("meta"), make(gaussian1d(5))):
        norm.to_empty(device="cpu")
        torch.testing.assert_close(norm(images()), expected, rtol=0, atol=0)
        norm.kernel.fill_(math.nan)  # a wrapper that allocates by itself, and then calls this
        norm.reset_parameters()
        torch.testing.assert_close(norm(images()), expected, rtol=0, atol=0)


def test_a_network_that_starts_on_the_meta_device():
    whole = models.convnet((4, 4, 8)).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.device("meta"):
        within = models.convnet((4, 4, 8))
    for start in (models.convnet((4, 4, 8), device="meta"), within):
        assert start.stage1.kernel.is_meta and next(start.parameters()).is_meta
        assigned = copy.deepcopy(start)
        start.to_empty(device="cpu").load_state_dict(whole.state_dict())
        assigned.load_state_dict(whole.state_dict(), assign=True)
        for model in (start, assigned):
            torch.testing.assert_close(model.eval()(x), whole(x), rtol=0, atol=0)


def test_a_kernel_given_on_the_meta_device_comes_with_a_state():
    state = nn.SubtractiveNorm2d(gaussian1d(5)).state_dict()
    norm = nn.SubtractiveNorm2d(torch.ones(5, device="meta")).to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="has no values yet: load a state or assign kernel"):
        norm(images())
    norm.load_state_dict(state)
    torch.testing.assert_close(norm.kernel, gaussian1d(5), rtol=0, atol=0)
    norm(images())


@pytest.mark.parametrize("make", NORMS, ids=IDS)
def test_an_assigned_kernel_stays(make):
    norm, other = make(gaussian1d(5)), torch.tensor([1.0, 2.0, 1.0])
    norm.kernel = other
    for cast in (torch.float64, torch.float32, torch.bfloat16):
        norm.to(cast)
        assert norm.kernel.dtype == torch.float64
        torch.testing.assert_close(norm.kernel, other.double(), rtol=0, atol=0)
    for clone in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        torch.testing.assert_close(clone.float()(images()), make(other)(images()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="kernel sizes must be odd"):
        norm.kernel = torch.ones(4)
    norm.kernel.mul_(3)  # the same kernel, but for its sum
    torch.testing.assert_close(norm.half().kernel, 3 * other.double(), rtol=0, atol=0)


@pytest.mark.parametrize("make", NORMS, ids=IDS)
def test_states_hold_the_kernel(make):
    norm = make(gaussian1d(7))
    state = norm.state_dict()
    assert list(state) == ["kernel"]
    make(gaussian1d(7)).load_state_dict(state)
    with pytest.raises(
        RuntimeError, match=r"kernel of the shape \(7,\), this \w+ has one of \(5,\)"
    ):
        make(gaussian1d(5)).load_state_dict(state)
    other = make(gaussian1d(7, sigma=0.5))
    with pytest.raises(RuntimeError, match=r"another kernel, \(7,\) \[0.230066, .* than this"):
        other.load_state_dict(state)
    torch.testing.assert_close(other.kernel, gaussian1d(7, sigma=0.5), rtol=0, atol=0)


def test_states_from_before_kernels_were_saved():
    model = models.convnet((4, 4, 8))
    state = model.state_dict()
    for name in [name for name in state if name.endswith("kernel")]:
        del state[name]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*stage1.kernel"):
        models.convnet((4, 4, 8)).load_state_dict(state)
    for metadata in state._metadata.values():
        metadata.pop("version", None)
    models.convnet((4, 4, 8)).load_state_dict(state)
    with pytest.raises(RuntimeError, match="7"):  # weights of 7 taps in a network of 15
        models.convnet((4, 4, 8), norm_kernel=15).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.LPPool2d(0, 2), ValueError, "norm_type must be > 0"),
        (lambda: nn.LPPool2d(2, 2, padding=2), ValueError, "padding must be"),
        (lambda: nn.LPPool2d(10**400, 2), ValueError, "norm_type"),
        (
            lambda: nn.LPPool2d(2, 2**70),
            ValueError,
            "kernel_size must fit 64 bits, got an int of 71",
        ),
        (lambda: nn.LPPool2d(2, (2, -(10**5000))), ValueError, "kernel_size must fit 64 bits"),
        (lambda: nn.LPPool2d(2, 2, padding=10**5000), ValueError, "padding must fit 64 bits"),
        (
            lambda: nn.LPPool2d(2, 2**63 - 1),
            ValueError,
            "kernel_size must be below 2.31, got 922337",
        ),
        (lambda: nn.LPPool2d(10**5000, 2), ValueError, "norm_type is too large for a float"),
        (lambda: nn.Softmax(dim=10**5000), ValueError, "dim must fit 64 bits"),
        (lambda: gaussian1d(10**5000), ValueError, "size must fit 64 bits"),
        (lambda: gaussian1d(7, sigma=10**5000), ValueError, "sigma is too large"),
        (lambda: nn.Softmax(dim="x"), TypeError, "Softmax: dim must be an int"),
        (lambda: nn.LogSoftmax(beta=math.inf), ValueError, "LogSoftmax: beta must be finite"),
        (lambda: nn.SoftmaxNLLLoss(reduction="average"), ValueError, "reduction must be"),
        (lambda: nn.SoftmaxNLLLoss(beta="1"), TypeError, "beta must be a number"),
        (lambda: nn.Stage2d(gaussian1d(3), "gelu"), ValueError, "activation must be one of"),
        (lambda: nn.DivisiveNorm2d(gaussian1d(3), -1.0), ValueError, "threshold must be"),
        (lambda: nn.SubtractiveNorm2d(torch.zeros(3)), ValueError, "sum must be finite and not 0"),
    ],
)
def test_constructors_check_their_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sizes_as_torch_takes_them():
    x = images()
    for size in (x.shape[-2:], torch.Size([6, 8]), (np.int64(6), np.int32(8)), [6, 8]):
        assert nn.LPPool2d(2, size)(x).shape == (2, 3, 1, 1)
    for size in (2, (2,), [2], np.int64(2), (2, 2)):
        assert nn.LPPool2d(np.float32(2), size, stride=(np.int8(2),))(x).shape == (2, 3, 3, 4)


def test_pooling_that_averages():
    x = torch.randn(2, 3, 9, 8)
    pool = nn.LPPool2d(3, 3, stride=2, padding=1, average=True)
    assert torch.equal(pool(x), mnist_ops.lp_pool2d(x, 3, 3, 2, 1, average=True))
    assert repr(pool).endswith("ceil_mode=False, average=True)")
    assert torch.equal(pickle.loads(pickle.dumps(pool))(x), pool(x))
    assert "average" not in repr(nn.LPPool2d(3, 3))
    del pool.average  # a pickle from before
    assert torch.equal(pool(x), mnist_ops.lp_pool2d(x, 3, 3, 2, 1))
