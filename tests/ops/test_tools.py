"""Tools that people use around a network: fx, traces, AOTInductor, checkpoints, several devices."""

from __future__ import annotations

import io
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from test_operators import Operator, every_operator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mnist_ops
from mnist_ops import gaussian1d
from mnist_ops import nn as ops_nn
from mnist_ops.mnist import models

MODULES = [
    ops_nn.LPPool2d(2, 2),
    ops_nn.SubtractiveNorm2d(gaussian1d(3)),
    ops_nn.DivisiveNorm2d(gaussian1d(3)),
    ops_nn.ContrastiveNorm2d(gaussian1d(3)),
    ops_nn.Stage2d(gaussian1d(3)),
    ops_nn.Sigmoid(),
    ops_nn.Softmax(1, -2.0),
    ops_nn.LogSoftmax(1),
]


class Calls(nn.Module):
    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return getattr(mnist_ops, self.operator.name)(x, **self.operator.arguments)


def value_and_gradient(function, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.pow(2).sum().backward()
    return y.detach(), leaf.grad


def assert_the_same(ours, theirs, x: Tensor, rtol: float = 0.0) -> None:
    for a, b in zip(value_and_gradient(ours, x), value_and_gradient(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# ---------------------------------------------------------------------------------------------- fx


@every_operator
def test_fx_records_an_operator_as_one_node(operator):
    graph = torch.fx.symbolic_trace(Calls(operator))
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [getattr(mnist_ops, operator.name)]
    x = torch.randn(2, 4, 5, 6)
    assert_the_same(graph, operator, x)
    assert_the_same(pickle.loads(pickle.dumps(graph)), operator, x)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_fx_traces_modules(module):
    assert_the_same(torch.fx.symbolic_trace(module), module, torch.randn(2, 4, 5, 6))


@pytest.mark.parametrize("log_softmax", ["torch7", "exact", None])
def test_fx_traces_networks(log_softmax):
    network = models.convnet((4, 4, 8), log_softmax=log_softmax)
    assert_the_same(torch.fx.symbolic_trace(network), network, torch.randn(2, 1, 32, 32))


def test_feature_extraction():
    features = pytest.importorskip("torchvision.models.feature_extraction")
    network = models.convnet((4, 4, 8))
    x = torch.randn(2, 1, 32, 32)
    extract = features.create_feature_extractor(network, ["stage1", "stage2", "log_softmax"])
    maps = extract(x)
    torch.testing.assert_close(maps["stage1"], network[:2](x), rtol=0, atol=0)
    torch.testing.assert_close(maps["stage2"], network[:4](x), rtol=0, atol=0)
    torch.testing.assert_close(maps["log_softmax"], network(x), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------- jit.trace

TRACE_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*deprecated", "ignore::torch.jit.TracerWarning"
)


@TRACE_WARNINGS
@every_operator
def test_jit_trace_with_gradients(operator):
    example = torch.randn(2, 4, 5, 6, requires_grad=True)
    traced = torch.jit.trace(lambda x: operator(x), (example,))
    assert f"mnist_ops::{operator.name}" in str(traced.graph)
    assert_the_same(traced, operator, torch.randn(2, 4, 5, 6))


@TRACE_WARNINGS
def test_jit_trace_of_networks():
    x = torch.randn(2, 1, 32, 32)
    network = models.convnet((4, 4, 8))
    assert_the_same(torch.jit.trace(network, torch.randn(2, 1, 32, 32)), network, x)
    # The approximate log-softmax above is Python, which no file holds.
    network = models.convnet((4, 4, 8), log_softmax="exact")
    traced = torch.jit.trace(network, torch.randn(2, 1, 32, 32))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for copy in (traced, torch.jit.load(file)):
        assert_the_same(copy, network, x)


# -------------------------------------------------------------------------------------- AOTInductor


def test_exported_numbers_can_be_written_and_read():
    """AOTInductor writes them as JSON, which has no infinity."""
    module = nn.Sequential(
        ops_nn.LPPool2d(math.inf, 2), ops_nn.Stage2d(gaussian1d(3), norm_type=math.inf)
    )
    x = torch.randn(2, 4, 9, 9)
    program = torch.export.export(module, (x,))
    numbers = [a for n in program.graph.nodes for a in n.args if isinstance(a, float)]
    assert numbers and all(map(math.isfinite, numbers))
    assert_the_same(program.module(), module, x)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, which AOTInductor compiles with")
    module = nn.Sequential(
        ops_nn.LPPool2d(math.inf, 2), ops_nn.Stage2d(gaussian1d(3), norm_type=math.inf)
    )
    x = torch.randn(2, 4, 9, 9)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(module, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    compiled = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)


# ------------------------------------------------------------------------ torch.func, checkpointing


def test_vmap_of_the_default_network():
    """Its approximate log-softmax is an autograd.Function."""
    network = models.convnet((4, 4, 8), dtype=torch.float64)
    x = torch.randn(3, 2, 1, 32, 32, dtype=torch.float64)
    expected = torch.stack([network(each) for each in x])
    torch.testing.assert_close(torch.func.vmap(network)(x), expected)

    parameters = {k: v.detach() for k, v in network.named_parameters()}
    target = torch.tensor([1, 2])

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        scores = torch.func.functional_call(network, values, (image[None],))
        return nn.functional.nll_loss(scores, label[None])

    gradient = torch.func.grad(loss)
    each = torch.func.vmap(gradient, in_dims=(None, 0, 0))(parameters, x[0], target)
    for i in range(2):
        one = gradient(parameters, x[0, i], target[i])
        for name, expected in one.items():
            torch.testing.assert_close(each[name][i], expected)


def test_the_approximate_log_softmax_has_the_same_jacobian_in_both_modes():
    from mnist_ops import torch7

    x = torch.randn(7, dtype=torch.float64)
    forward, reverse = (f(torch7.log_softmax)(x) for f in (torch.func.jacfwd, torch.func.jacrev))
    torch.testing.assert_close(forward, reverse)
    exact = torch.eye(7) - torch7.log_softmax(x).exp()
    torch.testing.assert_close(reverse, exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    network = models.convnet((4, 4, 8))
    x = torch.randn(2, 1, 32, 32)

    def gradients(forward) -> list[Tensor]:
        network.zero_grad()
        y, gradient = value_and_gradient(forward, x)
        return [y, gradient, *(p.grad.clone() for p in network.parameters())]

    ours = gradients(lambda t: checkpoint(network, t, use_reentrant=use_reentrant))
    for a, b in zip(ours, gradients(network), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---------------------------------------------------------------------------------- several devices


def check_shards() -> None:
    """Every operator of a tensor that two processes share, as DTensor; uneven parts too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    target = torch.arange(90).reshape(3, 5, 6) % 4
    kernel = gaussian1d(3)
    shared_kernel = distribute_tensor(kernel, mesh, [Replicate()])
    powers = torch.tensor([0.7, 1.0, 2.0, 3.5])
    shared_powers = distribute_tensor(powers, mesh, [Replicate()])
    x = torch.randn(3, 4, 5, 6)
    thresholds = torch.tensor([0.1, 0.9, 2.0])
    losses = {"target": target, "beta": -1.5, "reduction": "none"}
    cases = [
        ("lp_pool2d", {"norm_type": 2, "kernel_size": 2}, {0, 1}),
        ("lp_pool2d", {"norm_type": 3, "kernel_size": 3, "stride": 1}, {0, 1}),
        ("lp_pool2d", {"norm_type": powers, "kernel_size": 2}, {0}),
        ("lp_pool2d", {"norm_type": shared_powers, "kernel_size": 3, "average": True}, {0}),
        ("lp_pool2d", {"norm_type": torch.tensor(2.5), "kernel_size": 2}, {0}),
        ("local_mean2d", {"kernel": kernel}, {0}),
        ("local_mean2d", {"kernel": shared_kernel, "channels": "each"}, {0, 1}),
        ("subtractive_norm2d", {"kernel": kernel}, {0}),
        ("divisive_norm2d", {"kernel": shared_kernel}, {0}),
        ("contrastive_norm2d", {"kernel": kernel}, {0}),
        ("contrastive_norm2d", {"kernel": kernel, "threshold": thresholds}, {0}),
        ("stage2d", {"kernel": shared_kernel}, {0}),
        ("sigmoid", {}, {0, 1, 2, 3}),
        ("softmax", {"dim": 1}, {0, 2, 3}),
        ("log_softmax", {}, {0, 1, 2}),
        ("softmax_nll", losses, {0}),
        ("softmax_nll", {"target": target}, set()),
    ]
    for name, arguments, stay in cases:
        function = getattr(mnist_ops, name)
        local = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in arguments.items()}
        for place in (Replicate(), *map(Shard, range(4))):
            shared = distribute_tensor(x, mesh, [place])
            given = dict(arguments)
            for key in {"target", "threshold"} & given.keys():
                given[key] = distribute_tensor(given[key], mesh, [Replicate()])

            def ours(t: Tensor, shared=shared, given=given, function=function) -> Tensor:
                return function(t, **given)

            y, gradient = value_and_gradient(ours, shared)
            expected = value_and_gradient(lambda t: function(t, **local), x)
            where = f"{name} {place}"
            divided = place.is_shard() and place.dim in stay
            assert y.placements == ((place if divided else Replicate()),), where
            assert y.stride() == expected[0].stride(), where
            for a, b in zip((y, gradient), expected, strict=True):
                torch.testing.assert_close(a.full_tensor(), b, msg=lambda m, w=where: f"{w}: {m}")

    # The gradient of p: each process has that of its images.
    for place in (Replicate(), Shard(0), Shard(1)):
        p = distribute_tensor(powers, mesh, [Replicate()]).requires_grad_()
        leaf = powers.clone().requires_grad_()
        mnist_ops.lp_pool2d(distribute_tensor(x, mesh, [place]), p, 2).pow(2).sum().backward()
        mnist_ops.lp_pool2d(x, leaf, 2).pow(2).sum().backward()
        torch.testing.assert_close(p.grad.full_tensor(), leaf.grad)


def check_data_parallel(rank: int) -> None:
    """A batch in two halves has the gradients of the whole."""
    network = models.convnet((4, 4, 8), dtype=torch.float64)
    shared = nn.parallel.DistributedDataParallel(network)  # broadcasts what process 0 has
    x = torch.randn(4, 1, 32, 32, dtype=torch.float64)
    shared(x[2 * rank : 2 * rank + 2]).pow(2).mean().backward()
    ours = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    network(x).pow(2).mean().backward()
    for a, b in zip(ours, network.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)


def one_of_two(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    check_shards()
    check_data_parallel(rank)
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo, which connects processes on CPUs")
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "rendezvous"),), nprocs=2)
