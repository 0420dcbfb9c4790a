"""The reports' networks: shapes, parameters, and that they learn what they should."""

import pytest
import torch
from torch import nn

from mnist_ops import gaussian1d, torch7
from mnist_ops import nn as ops_nn
from mnist_ops.mnist import models
from mnist_ops.training import online


def shapes(model, size=32):
    """The shape after every layer, for one image."""
    x, result = torch.zeros(1, 1, size, size), {}
    for name, layer in model.named_children():
        x = layer(x)
        result[name] = tuple(x.shape[1:])
    return result


@pytest.mark.parametrize("fused", [True, False])
def test_original_network(fused):
    model = models.convnet(fused=fused)
    assert models.count_parameters(model) == 310_346
    stages = {"conv1": (64, 28, 28), "tanh1": (64, 28, 28), "pool1": (64, 14, 14),
              "norm1": (64, 14, 14), "conv2": (64, 10, 10), "tanh2": (64, 10, 10),
              "pool2": (64, 5, 5), "norm2": (64, 5, 5)}  # fmt: skip
    if fused:
        stages = {
            n.replace("norm", "stage"): s for n, s in stages.items() if n[:4] in ("conv", "norm")
        }
    end = {"flatten": (1600,), "linear1": (128,), "tanh3": (128,), "linear2": (10,)}
    assert shapes(model) == stages | end | {"log_softmax": (10,)}
    order = [f"{name}.{kind}" for name in ("conv1", "conv2", "linear1", "linear2")
             for kind in ("weight", "bias")]  # fmt: skip
    assert [name for name, _ in model.named_parameters()] == order
    # And the constant kernels of the normalizations.
    kernels = {f"{'stage' if fused else 'norm'}{i}.kernel" for i in (1, 2)}
    assert set(model.state_dict()) == {*order, *kernels}


def test_original_layers():
    model = models.convnet(fused=False)
    assert isinstance(model.log_softmax, torch7.LogSoftmax)
    assert isinstance(model.pool1, ops_nn.LPPool2d)
    torch.testing.assert_close(model.norm2.kernel.double(), gaussian1d(7), rtol=0, atol=1e-7)
    stage = models.convnet().stage2
    assert isinstance(stage, ops_nn.Stage2d)
    assert (stage.activation, stage.norm_type, stage.kernel_size, stage.stride) == ("tanh", 2, 2, 2)
    torch.testing.assert_close(stage.kernel.double(), gaussian1d(7), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": ("relu", nn.Tanh, "sigmoid")},
        {"activation": (ops_nn.Sigmoid, nn.Sigmoid, nn.Identity)},
        {"norm_type": 3.0, "padding": 2, "norm_kernel": (5, torch.ones(3, 5)), "dropout": 0.3},
        {"norm_type": float("inf"), "pool_size": (3, 2), "in_channels": 2},
    ],
    ids=str,
)
def test_fused_network_is_the_unfused_one(options):
    """The same initial values and random numbers, outputs, gradients; either state in either."""
    outcome = []
    for fused in (True, False):
        generator = torch7.start(1)
        model = models.convnet(
            (6, 8, 16), dtype=torch.float64, generator=generator, fused=fused, **options
        )
        names = {name for name, _ in model.named_children()}
        assert ({"stage1", "stage2"} <= names) == fused == ("norm1" not in names)
        torch.manual_seed(0)
        channels = options.get("in_channels", 1)
        x = torch.randn(5, channels, 32, 32, dtype=torch.float64, requires_grad=True)
        y = model(x)
        torch7.nll_loss(y, torch.arange(5)).backward()
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        outcome.append((model, y.detach(), gradients, generator.uniform(0.0, 1.0, (3,))))
    (a, y_a, grads_a, next_a), (b, y_b, grads_b, next_b) = outcome
    assert torch.equal(next_a, next_b)
    torch.testing.assert_close(y_a, y_b, rtol=1e-13, atol=1e-13)
    for ours, theirs in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    state = {name.replace("norm", "stage"): value for name, value in b.state_dict().items()}
    assert a.state_dict().keys() == state.keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, state[name])
    fresh = models.convnet((6, 8, 16), dtype=torch.float64, **options)
    fresh.load_state_dict(b.state_dict())
    fresh.eval(), a.eval()
    assert torch.equal(fresh(x), a(x))
    b.load_state_dict(fresh.state_dict())


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"norm_kernel": (None, 7)}, {"stage2"}),
        ({"pooling": ("lp", "max")}, {"stage1"}),
        ({"pooling": ("avg", None)}, set()),
        ({"pool_size": (2, 1)}, {"stage1", "stage2"}),
        ({"pool_size": (2, 1), "pooling": ("lp", None)}, {"stage1"}),
        ({"activation": (nn.ELU, "tanh", "tanh")}, {"stage2"}),
        ({"activation": lambda: nn.Sequential(nn.Tanh())}, set()),
    ],
    ids=["norm", "max", "avg", "pool_size", "no pool", "elu", "sequential"],
)
def test_where_a_stage_is_fused(options, stages):
    model = models.convnet((4, 4, 8), **options)
    assert {name for name, _ in model.named_children() if name.startswith("stage")} == stages
    assert shapes(model)["log_softmax"] == (10,)


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({"kernel_size": 3}, 512),
        ({"kernel_size": (5, 5, 3)}, 128),
        ({"padding": 2}, 2048),
        ({"pool_size": (2, 2, 1)}, 128),
    ],
)
def test_three_layer_networks(options, features):
    model = models.convnet((32, 64, 128, 256), **options)
    assert model.linear1.in_features == features
    assert shapes(model)["log_softmax"] == (10,)
    assert "stage3" in shapes(model)


@pytest.mark.parametrize("fused", [True, False])
def test_the_three_layer_network_of_report_1(fused):
    """LP pooling 1x1 is |x|, behind a tanh too; parameters and random words of the original."""
    generator = torch7.start(1)
    model = models.convnet(
        (32, 64, 128, 256), pool_size=(2, 2, 1), dtype=torch.float64, generator=generator,
        fused=fused,
    )  # fmt: skip
    assert models.count_parameters(model) == 292_618
    words = torch7.Generator(1)
    words.consume(296_033)
    assert generator.random32(1) == words.random32(1)
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    maps = x
    for stage in (1, 2, 3):
        maps = model.get_submodule(f"conv{stage}")(maps).tanh()
        size = 2 if stage < 3 else 1
        maps = (maps**2).unfold(2, size, size).unfold(3, size, size).sum((-2, -1)).sqrt()
        maps = ops_nn.SubtractiveNorm2d(gaussian1d(7)).double()(maps)
    assert maps.shape == (3, 128, 1, 1)
    hidden = model.linear1(maps.flatten(1)).tanh()
    expected = torch7.log_softmax(model.linear2(hidden))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    # The same by the engine, whose gradient of |x| is sign(x).
    labels = torch.arange(3)
    loss = torch7.nll_loss(expected, labels, reduction="none")
    gradients = torch.autograd.grad(loss[0], list(model.parameters()))
    engine = online.OnlineSGD(model, lr=0.0)
    losses, _ = engine.run(x, labels, labels)
    torch.testing.assert_close(losses, loss.detach(), rtol=1e-12, atol=1e-12)
    before = [p.detach().clone() for p in model.parameters()]
    online.OnlineSGD(model, lr=1.0, lr_decay=0.0).run(x, labels, labels[:1])
    for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(old - p, gradient, rtol=1e-9, atol=1e-12)


def test_a_kind_of_pooling_that_is_none():
    for size in (1, 2):
        with pytest.raises(ValueError, match="pooling must be 'lp', 'max', 'avg' or None"):
            models.convnet((4, 8), pooling="median", pool_size=size)


@pytest.mark.parametrize(
    ("activation", "kinds"),
    [
        ("relu", (nn.ReLU,) * 3),
        ("sigmoid", (ops_nn.Sigmoid,) * 3),
        (("relu", "relu", "tanh"), (nn.ReLU, nn.ReLU, nn.Tanh)),
        (nn.ELU, (nn.ELU,) * 3),
    ],
)
def test_activations(activation, kinds):
    model = models.convnet((4, 4, 8), activation, fused=False)
    found = [layer for layer in model if isinstance(layer, (nn.Tanh, *kinds))]
    assert tuple(map(type, found)) == kinds


def test_pooling_and_normalization_options():
    model = models.convnet((4, 4, 8), pooling=("max", "avg"), norm_kernel=(None, torch.ones(3, 5)))
    kinds = {name: type(layer) for name, layer in model.named_children()}
    assert kinds["pool1"] is nn.MaxPool2d and kinds["pool2"] is nn.AvgPool2d
    assert "norm1" not in kinds and tuple(model.norm2.kernel.shape) == (3, 5)
    assert "pool1" not in dict(models.convnet((4, 8), pooling=None).named_children())


@pytest.mark.parametrize("p", [1.0, 3.0, float("inf")])
def test_pooling_norm_type(p):
    model = models.convnet((2, 4), norm_type=p, norm_kernel=None, dtype=torch.float64)
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    maps = model.tanh1(model.conv1(x))
    windows = maps.unfold(2, 2, 2).unfold(3, 2, 2)
    expected = torch.linalg.vector_norm(windows, p, dim=(-2, -1))
    torch.testing.assert_close(model.pool1(maps), expected)


def test_dropout():
    assert isinstance(models.convnet((2, 4), dropout=0.5).dropout, nn.Dropout)
    generator = torch7.start(1)
    layer = models.convnet((2, 4), dropout=0.3, generator=generator).dropout
    assert isinstance(layer, torch7.Dropout)
    assert layer.generator is generator and layer.p == 0.3


def test_outputs():
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    ends = {}
    for options in (
        {"log_softmax": "torch7"},
        {"log_softmax": "exact"},
        {"log_softmax": None},
        {"log_softmax": None, "output_activation": "tanh"},
    ):
        generator = torch7.start(1)
        model = models.convnet((4, 8), dtype=torch.float64, generator=generator, **options)
        ends[str(list(options.values()))] = model(x)
    scores = ends["[None]"]
    torch.testing.assert_close(ends["['exact']"], torch.log_softmax(scores, -1))
    torch.testing.assert_close(ends["['torch7']"], torch.log_softmax(scores, -1), rtol=0, atol=2e-4)
    assert not torch.equal(ends["['torch7']"], ends["['exact']"])
    torch.testing.assert_close(ends["[None, 'tanh']"], torch.tanh(scores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype):
    model = models.convnet((4, 8), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.zeros(2, 1, 32, 32, dtype=dtype)).dtype == dtype


def test_other_images():
    model = models.convnet((4, 4, 8), in_channels=3, image_size=20, num_classes=7)
    assert model(torch.zeros(2, 3, 20, 20)).shape == (2, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (32, 64, 128, 256)}, r"stage 3 has a 1x1 map after the convolution"),
        ({"image_size": 4}, r"stage 1 has a 4x4 map, too small for kernel_size 5"),
        ({"widths": (64,)}, "one convolution and the fully connected layer"),
        ({"widths": (64, 0, 10)}, "every entry of widths must be an integer >= 1"),
        ({"kernel_size": (5, 5, 3)}, "kernel_size must be one value or 2, got 3"),
        ({"kernel_size": 0}, "kernel_size must be an integer >= 1, got 0"),
        ({"activation": "swish"}, "activation must be 'tanh', 'relu', 'sigmoid' or a callable"),
        ({"activation": ("tanh", "tanh")}, "activation must be one value or 3, got 2"),
        ({"pooling": "median"}, "pooling must be 'lp', 'max', 'avg' or None, got 'median'"),
        ({"log_softmax": "fast"}, "log_softmax must be 'torch7', 'exact' or None"),
        ({"output_activation": "sine"}, "activation must be 'tanh', 'relu', 'sigmoid'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"norm_type": -1.0}, "norm_type"),
        ({"norm_kernel": 6}, "odd"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        models.convnet(**options)


def test_gradient_reaches_every_parameter():
    model = models.convnet((4, 4, 8), dtype=torch.float64)
    x, target = torch.randn(3, 1, 32, 32, dtype=torch.float64), torch.tensor([1, 2, 3])
    torch7.nll_loss(model(x), target).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
