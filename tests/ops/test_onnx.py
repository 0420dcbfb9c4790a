"""Export to ONNX: what onnxruntime computes is what the operators compute."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from conftest import thinned
from test_operators import OPERATORS, Operator
from torch import Tensor, nn

import mnist_ops
from mnist_ops import gaussian1d
from mnist_ops import nn as ops_nn
from mnist_ops.mnist import models

pytest.importorskip("onnxscript", reason="onnxscript is not installed: nothing is exported")
onnxruntime = pytest.importorskip("onnxruntime", reason="there is no onnxruntime to run a model")

# What the exporter says of itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def export(module: nn.Module, x: Tensor, dynamic: dict[int, Any] | None = None) -> Any:
    shapes = None if dynamic is None else (dynamic,)
    return torch.onnx.export(
        module.eval(),
        (x,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=shapes,
        custom_translation_table=mnist_ops.onnx.translations(),
    )


def run(program: Any, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (argument,) = session.get_inputs()
    return [torch.from_numpy(y) for y in session.run(None, {argument.name: x.numpy()})]


class Calls(nn.Module):
    """Calls of several operators, whose tensors are buffers."""

    def __init__(self, operators: list[Operator]) -> None:
        super().__init__()
        self.operators = operators
        for i, operator in enumerate(operators):
            for name, value in operator.arguments.items():
                if isinstance(value, Tensor):
                    self.register_buffer(f"{name}{i}", value)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        results = []
        for i, operator in enumerate(self.operators):
            arguments = {
                k: getattr(self, f"{k}{i}") if isinstance(v, Tensor) else v
                for k, v in operator.arguments.items()
            }
            results.append(getattr(mnist_ops, operator.name)(x, **arguments))
        return tuple(results)


@pytest.mark.parametrize(
    ("dtype", "shape"), thinned((torch.float32, torch.float16), ((4, 5, 6), (2, 4, 5, 6)))
)
def test_every_operator(shape, dtype):
    operators = [o for o in OPERATORS if len(shape) == 4 or o.arguments.get("dim", 0) < 3]
    if len(shape) == 3:  # a batch of four vectors of five classes, six losses each
        operators = [o for o in operators if o.name != "softmax_nll"]
        target = torch.arange(24).reshape(4, 6) % 5
        operators += [
            Operator("softmax_nll", {"target": target, "reduction": reduction})
            for reduction in ("none", "sum", "mean")
        ]
    module = Calls(operators)
    program = export(module, torch.zeros(shape, dtype=dtype))
    x = torch.randn(shape).to(dtype)
    results = run(program, x)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-3
    for operator, ours, expected in zip(operators, results, module(x), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours, expected, rtol=tolerance, atol=tolerance, msg=lambda m, o=operator: f"{o}: {m}"
        )


class Losses(nn.Module):
    """Of every kind: ignored targets, weights, smoothing, probabilities."""

    def forward(self, x: Tensor, target: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        weight = torch.arange(1.0, 6.0, dtype=x.dtype)
        results = []
        for reduction in ("none", "sum", "mean"):
            for kwargs in ({}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.2}):
                for t, options in ((target, {"ignore_index": 2}), (p, {})):
                    y = mnist_ops.softmax_nll(x, t, 0.7, reduction, **kwargs, **options)
                    results.append(y)
        return tuple(results)


def test_losses():
    x, p = torch.randn(4, 5, 3), torch.rand(4, 5, 3)
    target = torch.arange(12).reshape(4, 3) % 5
    arguments = x, target, p
    program = torch.onnx.export(
        Losses().eval(),
        arguments,
        dynamo=True,
        verbose=False,
        custom_translation_table=mnist_ops.onnx.translations(),
    )
    for ours, expected in zip(program(*arguments), Losses()(*arguments), strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), expected, rtol=1e-5, atol=1e-5)


def test_a_dynamic_batch():
    operators = [o for o in OPERATORS if o.name != "softmax_nll"]
    module = Calls(operators)
    program = export(module, torch.zeros(2, 4, 5, 6), {0: torch.export.Dim("batch")})
    for count in (1, 5):
        x = torch.randn(count, 4, 5, 6)
        for operator, ours, expected in zip(operators, run(program, x), module(x), strict=True):
            torch.testing.assert_close(
                ours, expected, rtol=1e-5, atol=1e-5, msg=lambda m, o=operator: f"{o}: {m}"
            )


class Poolings(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            mnist_ops.lp_pool1d(x.flatten(1, 2), 2, 3, 2, 1),
            mnist_ops.lp_pool3d(x[:, None], 3, 2, ceil_mode=True),
            mnist_ops.lp_pool2d(x, 2, 2, 1, ((0, 1), (3, 0)), dilation=2),
        )


def test_sequences_volumes_and_dilation():
    program = export(Poolings(), torch.zeros(2, 4, 5, 6), {0: torch.export.Dim("batch")})
    x = torch.randn(3, 4, 5, 6)
    for ours, expected in zip(run(program, x), Poolings()(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_images_of_any_size():
    size = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    module = nn.Sequential(
        ops_nn.ContrastiveNorm2d(gaussian1d(5), 0.1), ops_nn.LPPool2d(3, 3, 2, 1)
    )
    program = export(module, torch.zeros(1, 3, 16, 16), size)
    x = torch.randn(1, 3, 11, 24)
    torch.testing.assert_close(run(program, x)[0], module(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as error:
        export(ops_nn.LPPool2d(2, 3, 2, ceil_mode=True), torch.zeros(1, 3, 16, 16), size)
    assert "ceil_mode needs a fixed height and width" in "".join(_messages(error.value))


def _messages(error: BaseException | None) -> list[str]:
    return [] if error is None else [str(error), *_messages(error.__cause__)]


def test_examples():
    results = doctest.testmod(mnist_ops.onnx)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize("fused", [True, False])
def test_networks(fused):
    network = models.convnet(fused=fused)
    program = export(network, torch.zeros(2, 1, 32, 32), {0: torch.export.Dim("batch")})
    if not fused:
        assert sum(node.op_type == "LpPool" for node in program.model.graph) == 2
    x = torch.randn(7, 1, 32, 32)
    torch.testing.assert_close(run(program, x)[0], network(x), rtol=1e-5, atol=1e-5)
