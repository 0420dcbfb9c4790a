"""The compiled online SGD: the autograd loop in float64 is its truth, and the original's run."""

import copy
import itertools
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import other_capabilities, why_no_cuda
from torch.nn import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Identity,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Tanh,
)

from mnist_ops import gaussian1d, gaussian2d, nn, torch7, training
from mnist_ops.mnist import data, models, transforms
from mnist_ops.torch7.optim import SGD
from mnist_ops.training import AutogradEngine, OptimizerEngine, online
from mnist_ops.training.engine import Steps
from mnist_ops.training.online import OnlineSGD, UnsupportedError

REFERENCE = Path(__file__).parents[1] / "reference" / "online_original.npz"
CRITERIA = {
    "nll": torch7.nll_loss,
    "multi_margin": torch7.multi_margin_loss,
    "mse": torch7.mse_loss,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def samples(*shape, count=20, classes=4, dtype=torch.float64):
    return torch.randn(count, *shape, dtype=dtype), torch.randint(0, classes, (count,))


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compare(model, images, labels, steps=100, rtol=1e-12, loss="nll", threads=1, **settings):
    """Train one copy with the engine and one through autograd, and hold them side by side."""
    theirs = copy.deepcopy(model)
    order = torch.randint(0, len(images), (steps,))
    engine = OnlineSGD(model, loss, threads=threads, **settings)
    got = engine.run(images, labels, order)
    sgd = SGD(theirs.parameters(), **({"lr_decay": 1e-7} | settings))
    expected = training.AutogradEngine(theirs, sgd, CRITERIA[loss]).run(images, labels, order)
    assert got[0].dtype == next(model.parameters()).dtype and got[0].shape == (steps,)
    scale = expected[0].abs().max().item()
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=rtol * scale)
    assert torch.equal(got[1], expected[1])
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        bound = rtol * other.abs().max().item()
        torch.testing.assert_close(
            ours, other, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert engine.steps == steps
    return got


# -------------------------------------------------------------------------- the original's numbers


@pytest.mark.parametrize(
    ("dtype", "loss_error", "value_error"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-5)],
    ids=["float64", "float32"],
)
def test_first_2000_steps_of_the_original(dtype, loss_error, value_error):
    with np.load(REFERENCE) as file:
        original = {name: file[name] for name in file.files}
    splits = data.prepare()
    model = models.convnet(dtype=dtype, generator=torch7.start(seed=1))
    engine = OnlineSGD(model, loss="nll", lr=1e-3, lr_decay=1e-7)
    order = torch.from_numpy(original["shuffle_epoch1"][:2000]).long() - 1
    pieces = [
        engine.run(splits.train_images, splits.train_labels, piece) for piece in order.split(300)
    ]
    losses, predictions = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    expected = torch.from_numpy(original["losses_first2000"])
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=loss_error)
    assert torch.equal(predictions + 1, torch.from_numpy(original["preds_first2000"]).long())
    expected = torch.from_numpy(original["params_after_2000"])
    torch.testing.assert_close(values(model).double(), expected, rtol=0, atol=value_error)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("nll", {}),
        ("nll", {"activation": "relu", "log_softmax": "exact"}),
        ("multi_margin", {"log_softmax": None}),
        ("mse", {"log_softmax": None, "output_activation": "tanh"}),
        ("nll", {"kernel_size": 3, "padding": 1, "widths": (16, 24, 20, 32)}),
        ("nll", {"dropout": 0.5, "norm_kernel": None, "pooling": "max"}),
    ],
    ids=["original", "relu", "multi-margin", "mse", "three stages", "dropout"],
)
def test_variants_of_the_reports(loss, options):
    generator = torch7.start(seed=3)
    options = {"widths": (20, 12, 24)} | options
    model = models.convnet(dtype=torch.float64, generator=generator, **options)
    compare(model, *samples(1, 32, 32, classes=10), loss=loss, lr=0.01, lr_decay=1e-3)


# --------------------------------------------------------------------------------------- each layer


def network(*layers, shape=(3, 9, 8), classes=4):
    """The layers behind a convolution and before a classifier, so that gradients pass through."""
    body = Sequential(Conv2d(shape[0], 9, 3), Tanh(), *layers, Flatten()).double()
    with torch.no_grad():
        features = body(torch.zeros(1, *shape, dtype=torch.float64)).shape[1]
    return Sequential(body, Linear(features, classes), torch7.LogSoftmax()).double()


LAYERS = {
    "conv": Conv2d(9, 5, 3),
    "conv many channels": Conv2d(9, 40, 2),
    "conv one output": Conv2d(9, 1, 3),
    "conv rectangular": Conv2d(9, 7, (2, 4)),
    "conv 1x1": Conv2d(9, 17, 1),
    "conv padded": Conv2d(9, 4, 5, padding=2),
    "conv padded unevenly": Conv2d(9, 4, (3, 2), padding=(0, 3)),
    "conv same": Conv2d(9, 4, (3, 5), padding="same"),
    "conv whole map": Conv2d(9, 12, (7, 6)),
    "conv without bias": Conv2d(9, 6, 3, bias=False),
    "tanh": Tanh(),
    "relu": ReLU(),
    "sigmoid": torch.nn.Sigmoid(),
    "own sigmoid": nn.Sigmoid(),
    "identity": Identity(),
    "flatten twice": Flatten(),
    "max pool": MaxPool2d(2),
    "max pool overlapping": MaxPool2d(3, 1),
    "max pool padded": MaxPool2d((3, 2), 2, padding=1, ceil_mode=True),
    "average pool": AvgPool2d(2),
    "average pool padded": AvgPool2d(3, 2, padding=1, ceil_mode=True),
    "average pool, padding not counted": AvgPool2d(3, 2, 1, count_include_pad=False),
    "average pool with a divisor": AvgPool2d((2, 3), 1, divisor_override=5),
    "norm": nn.SubtractiveNorm2d(gaussian1d(5)),
    "norm with a 2-D kernel": nn.SubtractiveNorm2d(torch.rand(3, 5)),
    "norm larger than the map": nn.SubtractiveNorm2d(gaussian2d(11)),
    "dropout": torch7.Dropout(0.3, torch7.Generator(7)),
    "no dropout": torch7.Dropout(0.0, torch7.Generator(7)),
    **{
        f"LP pool {p} {name}": nn.LPPool2d(p, *arguments)
        for p, (name, arguments) in itertools.product(
            (1, 2, 3, 1.5, 0.5, float("inf")),
            {
                "2x2": (2,),
                "overlapping": ((3, 2), 1),
                "padded": (3, 2, 1, True),
                "with gaps": (2, 3),
            }.items(),
        )
    },
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layer(layer):
    model = network(copy.deepcopy(layer))
    # The gradient of p < 1 is unbounded, and steps as large as the others' would diverge.
    compare(model, *samples(3, 9, 8), lr=1e-6 if getattr(layer, "norm_type", 1) < 1 else 0.02)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layer_first(layer):
    """Before any parameters, where no gradient is wanted; one channel and several."""
    for channels in (1, 9):
        if isinstance(layer, Conv2d):
            layer = Conv2d(
                channels,
                layer.out_channels,
                layer.kernel_size,
                padding=layer.padding,
                bias=layer.bias is not None,
            )
        body = Sequential(copy.deepcopy(layer), Flatten()).double()
        features = body.eval()(torch.zeros(1, channels, 7, 6, dtype=torch.float64)).shape[1]
        model = Sequential(body, Linear(features, 4), nn.LogSoftmax()).double()
        compare(model, *samples(channels, 7, 6), steps=30, lr=0.02)


@pytest.mark.parametrize(
    "last",
    [torch7.LogSoftmax(), nn.LogSoftmax(beta=-1.5), torch.nn.LogSoftmax(dim=1), Tanh(), Identity()],
    ids=["torch7", "own", "torch", "tanh", "none"],
)
@pytest.mark.parametrize("loss", CRITERIA)
def test_ends_and_losses(loss, last):
    model = Sequential(Linear(11, 13), nn.Sigmoid(), Linear(13, 7, bias=False), last).double()
    images, labels = samples(11, classes=7)
    compare(model, images, labels, loss=loss, lr=0.005)


def offset_network(beta, dtype):
    """Scores with a common offset, all of which are numbers of the type: what follows is not off.

    Returns the network, images, labels, the losses and the gradient of the first step's bias.
    """
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(-8, 9, (6, 5), generator=generator)
    weight = torch.randint(-8, 9, (40, 5), generator=generator) / 64
    model = Sequential(Linear(5, 40), nn.LogSoftmax(beta=beta)).to(dtype)
    model[0].weight.data.copy_(weight)
    model[0].bias.data.fill_(8192.0)
    labels = torch.randint(0, 40, (6,), generator=generator)
    logs = torch.log_softmax(beta * (images.double() @ weight.double().t()), 1)
    losses = -logs.gather(1, labels[:, None])[:, 0]
    gradient = beta * (logs[0].exp() - torch.nn.functional.one_hot(labels[0], 40))
    return model, images.to(dtype), labels, losses, gradient


@pytest.mark.parametrize("beta", [1.0, -0.75, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_common_offset_of_the_scores_costs_no_digits(dtype, beta):
    model, images, labels, losses, gradient = offset_network(beta, dtype)
    bias = model[0].bias.detach().clone()
    got, _ = OnlineSGD(model, "nll", lr=0.0).run(images, labels, torch.arange(6))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), losses, rtol=4 * eps, atol=0)
    OnlineSGD(model, "nll", lr=4096.0).run(images, labels, torch.arange(1))
    # 4096 times the gradient beside 8192: the change is rounded to 2^-10, or finer in float64.
    change = (bias - model[0].bias.detach()).double() / 4096
    torch.testing.assert_close(change, gradient, rtol=0, atol=4 * eps)


def test_vectors_and_a_single_layer():
    compare(Linear(5, 3).double(), *samples(5, classes=3), loss="mse", lr=0.01)
    model = Sequential(Linear(130, 66), Tanh(), Tanh(), Linear(66, 1)).double()
    compare(model, *samples(130, classes=1), loss="mse", lr=1e-3)
    # In front of the parameters, and one layer working on another's output, which that one needs.
    model = Sequential(Tanh(), ReLU(), torch7.LogSoftmax(), Linear(6, 4)).double()
    compare(model, *samples(6), loss="multi_margin", lr=0.1)
    model = network(nn.LPPool2d(2, 2), Tanh(), MaxPool2d(2), nn.Sigmoid(), ReLU())
    compare(model, *samples(3, 9, 8), lr=0.1)


def test_random_networks():
    random = np.random.default_rng(5)
    for _ in range(25):
        channels, height, width = (int(n) for n in random.integers(1, (20, 12, 12)))
        shape, layers = (channels, height, width), []
        for _ in range(random.integers(1, 6)):
            k = int(random.integers(1, 4))
            kind = random.integers(0, 7)
            layer = [
                lambda: Conv2d(channels, int(random.integers(1, 36)), k, padding=k // 2),
                lambda: nn.LPPool2d(float(random.uniform(0.6, 4)), k, int(random.integers(1, 4))),
                lambda: nn.LPPool2d(2, k),
                lambda: MaxPool2d(k),
                lambda: AvgPool2d(k),
                lambda: nn.SubtractiveNorm2d(torch.rand(2 * k - 1) + 0.1),
                lambda: Tanh(),
            ][kind]()
            try:
                out = layer(torch.zeros(1, channels, height, width))
            except (ValueError, RuntimeError):
                continue
            if 0 in out.shape:
                continue
            layers.append(layer)
            channels, height, width = out.shape[1:]
        head = [Flatten(), Linear(channels * height * width, 4), torch7.LogSoftmax()]
        compare(Sequential(*layers, *head).double(), *samples(*shape), steps=20, lr=0.01)


# ------------------------------------------------------------------------- optimizer, dtypes, runs


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_decay": 0.1},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.5, "dampening": 0.0},
        {"momentum": 0.5, "dampening": 0.25, "weight_decay": 0.01, "lr_decay": 0.01},
        {"momentum": 0.5, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_settings_of_sgd(settings, dtype):
    model = network(nn.LPPool2d(2, 2), Conv2d(9, 6, 2)).to(dtype)
    images, labels = samples(3, 9, 8)
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    compare(model, images, labels, lr=0.02, rtol=rtol, **settings)


@pytest.mark.parametrize("images_dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_images_of_either_type(dtype, images_dtype):
    model = network(nn.LPPool2d(2, 2)).to(dtype)
    images, labels = samples(3, 9, 8, dtype=images_dtype)
    compare(model, images, labels, rtol=1e-12 if dtype == torch.float64 else 2e-5, lr=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_windows_of_zeros_and_of_tiny_and_huge_numbers(dtype):
    # Rectified maps have windows of zeros; squares of these overflow or underflow.
    limit = torch.finfo(dtype)
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    for scale in (1.0, limit.tiny**0.6, limit.max**0.6):
        model = Sequential(
            Conv2d(1, 9, 3, bias=False), ReLU(), nn.LPPool2d(2, 2), Flatten(), Linear(81, 4), Tanh()
        ).to(dtype)
        with torch.no_grad():
            model[4].weight /= scale
        images, labels = samples(1, 8, 8)
        # With a gradient of 1/scale for the convolution's weights, which must not move far.
        lr = 1e-3 if scale == 1.0 else 0.0
        losses, _ = compare(model, images * scale, labels, steps=20, lr=lr, rtol=rtol, loss="mse")
        assert losses.isfinite().all() and losses.std() > 0


def test_nan_is_reported_not_hidden():
    model = network(nn.LPPool2d(2, 2), nn.SubtractiveNorm2d(gaussian1d(3)), MaxPool2d(2))
    images, labels = samples(3, 9, 8)
    images[3, 1, 4, 4] = torch.nan
    losses, predictions = OnlineSGD(model).run(images, labels, torch.arange(3, 5))
    assert losses.isnan().all()
    assert ((predictions >= 0) & (predictions < 4)).all()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_nan_anywhere_in_a_window_is_reported(p):
    for row, column in itertools.product(range(2), range(2)):
        model = network(nn.LPPool2d(p, 2))
        images, labels = samples(3, 9, 8)
        images[0, 1, 4 + row, 4 + column] = torch.nan
        losses, _ = OnlineSGD(model, lr=0.0).run(images, labels, torch.arange(1))
        assert losses.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_fused_stage_is_its_three_layers(dtype):
    """The same bits, and the names of the layers in messages."""
    outcome = []
    for fused in (True, False):
        generator = torch7.start(1)
        model = models.convnet(
            (9, 8, 12),
            activation=("relu", torch.nn.Identity, "tanh"),
            norm_type=3.0,
            dtype=dtype,
            generator=generator,
            fused=fused,
        )
        assert fused == isinstance(model[1], nn.Stage2d)
        torch.manual_seed(0)
        images, labels = samples(1, 32, 32, count=6)
        losses, _ = OnlineSGD(model, lr=0.01, momentum=0.5).run(images, labels, torch.arange(6))
        outcome.append((losses, values(model)))
    for ours, theirs in zip(*outcome, strict=True):
        assert torch.equal(ours, theirs)
    model = models.convnet((4, 4, 8))
    model.stage2.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="layer 'stage2' has hooks"):
        OnlineSGD(model)
    small = Sequential(Conv2d(1, 2, 3), nn.Stage2d(gaussian1d(3), kernel_size=9), Flatten())
    small.append(Linear(2, 4))
    with pytest.raises(RuntimeError, match=r"layer '1.pool' \(lp_pool2d\): kernel_size \(9, 9\)"):
        OnlineSGD(small).run(*samples(1, 8, 8, dtype=torch.float32), torch.arange(1))


def test_memory_formats_and_strides():
    model = network(Conv2d(9, 5, 3)).to(memory_format=torch.channels_last)
    model[1].weight.data = model[1].weight.data.t().contiguous().t()
    assert not model[0][2].weight.is_contiguous() and not model[1].weight.is_contiguous()
    images, labels = samples(18, 3, 8, count=40)
    images = images[:, ::2].transpose(1, 2)[::2]
    compare(model, images, labels[1::2], lr=0.02, momentum=0.5)
    assert not model[0][2].weight.is_contiguous() and not model[1].weight.is_contiguous()


def chunked_setup(threads=1):
    torch.manual_seed(2)
    generator = torch7.start(seed=5)
    model = models.convnet(
        (17, 20, 24), dropout=0.25, generator=generator, dtype=torch.float64, image_size=20
    )
    return model, generator, OnlineSGD(model, lr=0.02, momentum=0.5, threads=threads)


def test_chunks_threads_and_saved_states_change_nothing(tmp_path):
    images, labels = samples(1, 20, 20, classes=10)
    order = torch.randint(0, 20, (60,))
    model, generator, engine = chunked_setup()
    expected = engine.run(images, labels, order)

    other, _, pieces = chunked_setup()
    first = [pieces.run(images, labels, piece) for piece in order[:30].split([1, 22, 7, 0])]
    saved = {"model": other.state_dict(), "engine": pieces.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    pieces.run(images, labels, order[:10])  # goes on, and must leave the saved state alone

    torch.set_num_threads(2)
    resumed, resumed_generator, threaded = chunked_setup(threads=2)
    resumed_generator.consume(3)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    threaded.load_state_dict(state["engine"])
    assert threaded.steps == 30
    second = threaded.run(images, labels, order[30:])
    torch.set_num_threads(1)

    parts = [*first, second]
    assert torch.equal(torch.cat([losses for losses, _ in parts]), expected[0])
    assert torch.equal(torch.cat([classes for _, classes in parts]), expected[1])
    assert torch.equal(values(resumed), values(model))
    assert (resumed_generator.random32(5) == generator.random32(5)).all()


@pytest.mark.parametrize("capability", [c for c in other_capabilities() if c != "baseline"])
def test_the_same_bits_with_another_instruction_set(capability, tmp_path):
    """But for the baseline, which has no fused multiply-add."""
    script = """
import sys, torch, mnist_ops
from test_online import trained_values
assert mnist_ops.build_info()["cpu_capability"] == sys.argv[1]
torch.save(trained_values(), sys.argv[2])
"""
    path = tmp_path / "values.pt"
    variables = {"MNIST_OPS_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, capability, str(path)]
    subprocess.run(command, env={**os.environ, **variables}, check=True)
    for ours, theirs in zip(trained_values(), torch.load(path), strict=True):
        assert torch.equal(ours, theirs)


def trained_values():
    """The parameters of some networks after some steps."""
    networks = [{"activation": "relu"}, {"widths": (9, 20, 21, 26), "kernel_size": 3, "padding": 1}]
    torch.manual_seed(3)
    results = []
    for dtype, options in itertools.product((torch.float64, torch.float32), networks):
        model = models.convnet(dtype=dtype, generator=torch7.start(seed=1), **options)
        images, labels = samples(1, 32, 32, classes=10, dtype=dtype)
        OnlineSGD(model, lr=0.02, momentum=0.5).run(images, labels, torch.arange(20))
        OnlineSGD(model, lr=0.02).run(images, labels, torch.arange(20))
        results.append(values(model))
    return results


def test_the_first_step_is_the_first_that_is_made(device):
    """Not a call without samples, nor one that failed: then the velocity is the gradient."""
    images, labels = (tensor.to(device) for tensor in samples(5, classes=3))
    model = Linear(5, 3).double().to(device)
    found = []
    for calls_before in (False, True):
        ours = copy.deepcopy(model)
        engine = OnlineSGD(ours, "mse", lr=0.1, momentum=0.5)
        if calls_before:
            engine.run(images, labels, torch.arange(0))
            with pytest.raises(RuntimeError, match="order must be in"):
                engine.run(images, labels, torch.tensor([20]))
        engine.run(images, labels, torch.arange(3))
        found.append(values(ours))
    assert torch.equal(*found)


def test_states_that_do_not_fit():
    _, _, engine = chunked_setup()
    engine.run(*samples(1, 20, 20, classes=10), torch.arange(3))
    state = engine.state_dict()
    plain = OnlineSGD(models.convnet((17, 20, 24), image_size=20, dtype=torch.float64))
    with pytest.raises(ValueError, match="velocities do not go with the momentum"):
        plain.load_state_dict(state)
    with pytest.raises(ValueError, match="dropout"):
        plain.load_state_dict({**state, "velocities": []})
    with pytest.raises(ValueError, match="velocities are of another network"):
        chunked_setup()[2].load_state_dict({**state, "velocities": state["velocities"][:2]})


# ------------------------------------------------------------------------------- several models


def several(device="cpu", count=3, **options):
    """Networks of other seeds, the middle one with a kernel of its own."""
    options = {"dropout": 0.25, "dtype": torch.float64, "image_size": 16} | options
    networks = [
        models.convnet((5, 8, 12), device=device, generator=torch7.start(seed), **options)
        for seed in range(count)
    ]
    networks[1].stage1.kernel.mul_(torch.rand(7).to(networks[1].stage1.kernel))
    return networks


def test_several_models_are_each_as_if_alone(device, tmp_path):
    networks = several(device)
    alone = copy.deepcopy(networks)
    images, labels = samples(1, 16, 16, classes=10)
    order = torch.randint(0, 20, (3, 40))
    rates, settings = [0.02, 0.05, 0.01], {"lr_decay": 0.01, "momentum": 0.5}
    engine = OnlineSGD(networks, lr=rates, weight_decay=[0.0, 0.1, 0.0], **settings)
    assert engine.description.endswith("batch size 1, 3 models at once")
    images, labels = images.to(device), labels.to(device)
    parts = [engine.run(images, labels, order[:, :25])]
    torch.save(engine.state_dict(), tmp_path / "state.pt")
    engine.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    parts.append(engine.run(images, labels, order[:, 25:].to(device)))
    losses, predictions = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    assert losses.shape == predictions.shape == (3, 40) and losses.device.type == device
    for i, model in enumerate(alone):
        one = OnlineSGD(model, lr=rates[i], weight_decay=[0.0, 0.1, 0.0][i], **settings)
        expected = one.run(images, labels, order[i])
        assert torch.equal(losses[i], expected[0]) and torch.equal(predictions[i], expected[1])
        assert torch.equal(values(networks[i]), values(model))
        assert engine.engines[i].steps == one.steps == 40
    with pytest.raises(ValueError, match="the state is of 3 models, not of one"):
        one.load_state_dict(engine.state_dict())
    with pytest.raises(ValueError, match="the state is of no list of models, not of 3"):
        engine.load_state_dict(one.state_dict())


def test_one_order_for_several_models():
    images, labels = samples(1, 16, 16, classes=10)
    losses, _ = OnlineSGD(several(count=2)).run(images, labels, torch.arange(5))
    assert losses.shape == (2, 5) and not torch.equal(losses[0], losses[1])


def test_none_of_several_models_changes_where_one_cannot():
    images, labels = samples(1, 16, 16, classes=10)
    networks = several()
    engine = OnlineSGD(networks, momentum=0.5)
    engine.run(images, labels, torch.arange(2))
    before = [
        (values(model), one.state_dict())
        for model, one in zip(networks, engine.engines, strict=True)
    ]
    order = torch.arange(6).reshape(3, 2)
    order[2, 1] = 20
    with pytest.raises(RuntimeError, match=r"order must be in \[0, 20\), got 20 at position 1"):
        engine.run(images, labels, order)
    for (numbers, state), model, one in zip(before, networks, engine.engines, strict=True):
        assert torch.equal(values(model), numbers) and one.steps == 2
        for now, then in zip(one.velocities, state["velocities"], strict=True):
            assert torch.equal(now, then)
        assert str(one.state_dict()["generator"]) == str(state["generator"])
    with pytest.raises(RuntimeError, match=r"order must be int64 \(M,\) or \(3, M\), got"):
        engine.run(images, labels, order[:2])


def test_models_that_cannot_run_together():
    one, two, three = several()
    with pytest.raises(ValueError, match="one at least"):
        OnlineSGD([])
    with pytest.raises(ValueError, match="model 1 shares parameters with one before it"):
        OnlineSGD([one, one])
    with pytest.raises(ValueError, match="model 1 differs from model 0 in its layers"):
        OnlineSGD([one, several(activation="relu")[0]])
    with pytest.raises(
        ValueError, match="lr must be one number or one for each of 2 models, got 3"
    ):
        OnlineSGD([one, two], lr=[0.1, 0.2, 0.3])
    two.dropout.generator = one.dropout.generator
    with pytest.raises(ValueError, match="model 1 shares its generator"):
        OnlineSGD([one, two, three])


@pytest.mark.parametrize("transforming", [False, True])
def test_loops_side_by_side_are_each_as_if_alone(device, transforming, monkeypatch):
    """Of different lengths, rates and kinds; those alike are one run of several models."""
    images, labels = samples(1, 16, 16, classes=10)
    lengths, rates = [40, 40, 25, 30], [0.02, 0.05, 0.01, 0.01]
    order = torch.randint(0, 20, (4, 40))

    def loops():
        torch.manual_seed(1)
        networks = [
            *several(device, 3, dropout=0.25),
            *several(device, 2, activation="relu", dropout=0.0)[:1],
        ]
        return [train(i, model) for i, model in enumerate(networks)]

    def train(i, model):
        sgd = SGD(model.parameters(), lr=rates[i], momentum=0.5 * (i != 3))
        transform = (lambda image: image * (1 + i)) if transforming else None
        engine = OptimizerEngine(model, sgd, transform=transform)
        parts = []
        for piece in order[i, : lengths[i]].split(10):
            parts.append((yield Steps(engine, images, labels, piece)))
        losses, predictions = (torch.cat(each) for each in zip(*parts, strict=True))
        return torch.cat([losses.double().cpu(), predictions.cpu(), values(model).cpu()])

    expected = [training.side_by_side([loop])[0] for loop in loops()]
    together, real = [], OnlineSGD.of_engines
    monkeypatch.setattr(
        OnlineSGD, "of_engines", lambda engines: together.append(len(engines)) or real(engines)
    )
    for ours, alone in zip(training.side_by_side(loops()), expected, strict=True):
        assert torch.equal(ours, alone)
    assert together == [3, 3, 2, 2]  # the third loop's last piece is of another length


def test_an_error_is_raised_in_the_loops_whose_run_it_was():
    images, labels = samples(1, 16, 16, classes=10)
    networks, closed = several(count=4, dropout=0.0), []

    def train(i):
        engine = OptimizerEngine(networks[i], SGD(networks[i].parameters()))
        order = torch.arange(20 if i == 2 else 10)  # another length, a run of its own
        try:
            yield Steps(engine, images, labels, order + (15 if i == 1 else 0))
        except RuntimeError as error:
            return str(error)
        return engine.steps

    found = training.side_by_side([train(i) for i in range(3)])
    assert all("order must be in [0, 20), got 20" in error for error in found[:2])
    assert found[2] == 20

    def bad():
        yield Steps(AutogradEngine(networks[0], SGD(networks[0].parameters())), images, labels, 7)

    def endless():
        try:
            while True:
                yield Steps(
                    OptimizerEngine(networks[3], SGD(networks[3].parameters())),
                    images,
                    labels,
                    torch.arange(2),
                )
        finally:
            closed.append(True)

    with pytest.raises(TypeError, match="index_select"):  # which nobody handles: all end
        training.side_by_side([endless(), bad()])
    assert closed == [True]
    assert training.side_by_side([]) == []


def test_settings_that_cannot_be_are_an_error_of_their_loop():
    """As where a callback of one loop has set its momentum to NaN."""
    images, labels = samples(1, 16, 16, classes=10)

    def train(model, momentum):
        sgd = SGD(model.parameters())
        engine = OptimizerEngine(model, sgd)
        try:
            for sgd.param_groups[0]["momentum"] in (0.5, momentum):
                yield Steps(engine, images, labels, torch.arange(2))
        except ValueError as error:
            return str(error)
        return engine.steps

    momenta = (0.5, float("nan"), 0.5)
    loops = [train(*each) for each in zip(several(dropout=0.0), momenta, strict=True)]
    one, error, other = training.side_by_side(loops)
    assert one == other == 4 and "momentum must be" in error


def test_images_of_two_sizes_side_by_side():
    """Transformed ones are copied together: those of one size."""
    sizes = torch.randn(20, 1, 16, 16), torch.randn(20, 1, 17, 17)
    networks = [
        Sequential(Conv2d(1, 3, 3), MaxPool2d(2), Flatten(), Linear(147, 4)) for _ in range(4)
    ]
    labels = torch.randint(0, 4, (20,))

    def train(model, images):
        engine = OptimizerEngine(model, SGD(model.parameters()), transform=torch.neg)
        losses, _ = yield Steps(engine, images, labels, torch.arange(9))
        return losses.tolist()

    pairs = list(zip(networks, sizes * 2, strict=True))
    alone = [training.side_by_side([train(copy.deepcopy(model), x)])[0] for model, x in pairs]
    assert training.side_by_side([train(*pair) for pair in pairs]) == alone


def test_fits_side_by_side(tmp_path):
    """Each with its folder, and the deterministic convolutions as long as one is under way."""
    images, labels = samples(1, 16, 16, classes=10)
    flags = []

    def arguments(model, i, folder):
        return {
            "model": model, "train": (images, labels), "test": (images, labels), "epochs": 2 + i,
            "optimizer": SGD(model.parameters(), lr=0.01 * (i + 1)), "chunk": 7,
            "generator": torch7.Generator(i), "folder": folder, "verbose": False,
            "on_epoch": lambda result: flags.append(torch.backends.cudnn.deterministic),
        }  # fmt: skip

    def plain(history):
        return [replace(result, seconds=0.0) for result in history]

    torch.manual_seed(1)
    alone = [
        training.fit(**arguments(model, i, tmp_path / f"alone{i}"))
        for i, model in enumerate(several(count=2, dropout=0.0))
    ]
    torch.manual_seed(1)
    found = training.side_by_side(
        [
            training.fitting(**arguments(model, i, tmp_path / f"together{i}"))
            for i, model in enumerate(several(count=2, dropout=0.0))
        ]
    )
    assert [plain(one) for one in found] == [plain(one) for one in alone]
    assert [len(one) for one in found] == [2, 3]
    assert all(flags) and not torch.backends.cudnn.deterministic
    for i in range(2):
        states = [
            training.load_checkpoint(tmp_path / f"{kind}{i}" / training.CHECKPOINT)["model"]
            for kind in ("alone", "together")
        ]
        assert all(map(torch.equal, states[0].values(), states[1].values()))


# ---------------------------------------------------------------------------------------- on CUDA


@pytest.fixture
def cuda():
    """The device, for what has no meaning on the CPU or compares with it."""
    reason = why_no_cuda()
    if reason:
        pytest.skip(f"CUDA: {reason}")
    return "cuda"


def on_both(device, model, steps=50, shape=(3, 9, 8), classes=4, **settings):
    """Train copies on the CPU and on the device; losses, predictions, and all values of both."""
    images, labels = samples(*shape, classes=classes)
    order = torch.randint(0, 20, (steps,))
    found = []
    for where in ("cpu", device):
        ours = copy.deepcopy(model).to(where)
        engine = OnlineSGD(ours, **settings)
        losses, predictions = engine.run(images, labels, order)
        assert losses.device.type == where and engine.steps == steps
        state = torch.cat([values(ours), *(v.flatten() for v in engine.velocities)])
        found.append((losses.cpu(), predictions.cpu(), state.cpu()))
    return found


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layer_on_cuda(cuda, layer):
    model = network(copy.deepcopy(layer))
    lr = 1e-6 if getattr(layer, "norm_type", 1) < 1 else 0.02
    expected, found = on_both(cuda, model, lr=lr, momentum=0.5)
    for got, wanted in zip(found, expected, strict=True):
        bound = 1e-11 * wanted.abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=0, atol=bound)


def test_a_thousand_steps_on_cuda(cuda):
    model = models.convnet(dtype=torch.float64, generator=torch7.start(seed=1))
    images = {"shape": (1, 32, 32), "classes": 10}
    expected, found = on_both(cuda, model, steps=1000, lr=1e-3, **images)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    expected, found = on_both(cuda, model.float(), steps=1000, lr=1e-3, **images)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_same_bits_in_every_run(cuda, dtype):
    """Alone, and as one model among few and among many others."""
    images, labels = samples(1, 32, 32, classes=10)
    order = torch.randint(0, 20, (100,))
    found = []
    for among in (1, 1, 5, 200):
        networks = [
            models.convnet(dtype=dtype, device=cuda, generator=torch7.start(seed=1))
            for _ in range(among)
        ]
        losses, _ = OnlineSGD(networks).run(images, labels, order)
        found.append(torch.cat([losses[-1], values(networks[-1])]))
    assert all(torch.equal(found[0], other) for other in found)


def test_opcheck_on_cuda(cuda):
    networks = [network(nn.LPPool2d(2, 2), nn.SubtractiveNorm2d(gaussian1d(3))) for _ in range(2)]
    engine = OnlineSGD([model.to(cuda) for model in networks], momentum=0.5)
    images, labels = samples(3, 9, 8)
    values_of = [p.detach().clone() for model in networks for p in model.parameters()]
    settings = torch.tensor([[0.1, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0]] * 2, dtype=torch.float64)
    arguments = (
        values_of,
        [torch.zeros_like(value) for value in values_of],
        engine.engines[0]._network,
        [kernel for each in engine.engines for kernel in each._kernels],
        *(images.to(cuda), labels.to(cuda), torch.arange(10, device=cuda).reshape(2, 5)),
        torch.empty(0, dtype=torch.float64, device=cuda),
        *(0, settings, False),
    )
    torch.library.opcheck(torch.ops.mnist_ops.online_sgd_models, arguments)


def test_errors_on_the_device_change_nothing(device):
    model = network(nn.LPPool2d(2, 2)).to(device)
    before = values(model).clone()
    images, labels = samples(3, 9, 8)
    images, labels = images.to(device), labels.to(device)
    engine = OnlineSGD(model, momentum=0.5)
    for wrong, message in [(20, "order must be in"), (-(2**62), "order must be in")]:
        with pytest.raises(RuntimeError, match=message):
            engine.run(images, labels, torch.tensor([0, wrong], device=device))
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 4\), got 4 at position 1"):
        engine.run(images, labels.where(labels < 0, 4), torch.tensor([1], device=device))
    assert torch.equal(values(model), before) and engine.steps == 0
    assert engine.velocities == []  # the next step is still the first one


def test_fit_on_the_device(device, capsys):
    """The engine is taken, moves the images once, and gives what the CPU gives."""
    histories = []
    for where in {"cpu", device}:
        model, _, generator = fit_setup(dropout=0.5, device=where)
        sgd = SGD(model.parameters(), lr=0.01, lr_decay=1e-4, momentum=0.5)
        torch.manual_seed(3)
        histories.append(fit(model, sgd, generator, chunk=7))
        assert f"compiled online SGD, float64, {where}" in capsys.readouterr().out
    losses = [[result.train_loss for result in history] for history in histories]
    assert losses[0] == pytest.approx(losses[-1], rel=1e-11)


def test_what_moves_to_the_device_moves_once():
    engine = OnlineSGD(Linear(2, 2).double(), "mse")
    images = torch.randn(4, 2)
    engine._device = torch.device("meta")
    first = engine._place("images", images)
    assert first.device.type == "meta" and engine._place("images", images) is first
    images[0] = 1.0
    assert engine._place("images", images) is not first
    assert engine._place("images", first) is first


def elementwise(layer, x):
    """The layer of each number as the engine computes it: the loss is minus the score."""
    model = Sequential(Linear(1, 1, bias=False), layer).to(x.dtype)
    torch.nn.init.ones_(model[0].weight)
    images = x.unsqueeze(1)
    labels = torch.zeros(len(x), dtype=torch.int64)
    losses, _ = OnlineSGD(model, lr=0.0).run(images, labels, torch.arange(len(x)))
    return -losses


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_tanh_and_sigmoid_to_the_last_places(dtype):
    random = np.random.default_rng(0)
    x = np.concatenate(
        [
            random.uniform(-1, 1, 3000) * 10.0 ** random.uniform(-8, 1.5, 3000),
            random.uniform(-1, 1, 3000),
            np.linspace(-25, 25, 1001),
            [0.0, -0.0, np.finfo(dtype).tiny, 1e-30, 100.0, -100.0, 1e30],
        ]
    ).astype(dtype)
    exact = x.astype(np.longdouble)
    tanh = elementwise(Tanh(), torch.from_numpy(x)).numpy()
    error = np.abs(tanh - np.tanh(exact)) / np.spacing(np.abs(np.tanh(exact)).astype(dtype))
    assert error.max() < 3
    for special, value in [(np.nan, np.nan), (np.inf, 1.0), (-np.inf, -1.0)]:
        y = elementwise(Tanh(), torch.from_numpy(np.array([special], dtype)))
        np.testing.assert_equal(y.item(), value)
    finite = exact[np.abs(exact) < 80]
    sigmoid = elementwise(nn.Sigmoid(), torch.from_numpy(finite.astype(dtype))).numpy()
    expected = 1 / (1 + np.exp(-finite))
    assert (np.abs(sigmoid - expected) / np.spacing(expected.astype(dtype))).max() < 3


# ----------------------------------------------------------------------------------- the operator


def test_opcheck():
    model = Sequential(
        Conv2d(1, 3, 3), nn.SubtractiveNorm2d(gaussian1d(3)), Flatten(), Linear(27, 4)
    )
    model = model.double()
    images, labels = samples(1, 5, 5)
    for momentum in (0.0, 0.5):
        engine = OnlineSGD(model, loss="mse", momentum=momentum)
        parameters = [p.detach().clone() for p in model.parameters()]
        arguments = (
            parameters,
            [torch.zeros_like(p) for p in parameters] if momentum else [],
            engine._network,
            [model[1].kernel],
            *(images, labels, torch.arange(5), torch.empty(0, dtype=torch.float64)),
            *(2, 0, 0.1, 0.0, 0.0, momentum, 0.0, False, False, 1),
        )
        torch.library.opcheck(torch.ops.mnist_ops.online_sgd, arguments)


def test_autograd_notices_the_change():
    model = Sequential(Linear(3, 4), Tanh(), Linear(4, 2)).double()
    images, labels = samples(3, classes=2)
    output = model(images).sum()
    OnlineSGD(model, loss="mse").run(images, labels, torch.arange(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_other_threads_run_meanwhile():
    model = models.convnet((32, 32, 32), dtype=torch.float64)
    engine = OnlineSGD(model)
    images, labels = samples(1, 32, 32, classes=10)
    started, finished = threading.Event(), threading.Event()

    def train():
        started.set()
        engine.run(images, labels, torch.randint(0, 20, (400,)))
        finished.set()

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    started.wait()
    turns = 0
    while not finished.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 10  # with the lock held it would be 0 or 1


# ------------------------------------------------------------------------------------------ errors


def frozen():
    layer = Linear(3, 4)
    layer.bias.requires_grad_(False)
    return layer


def hooked():
    layer = Linear(3, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Conv2d(1, 2, 3, stride=2), r"layer '0.odd' \(Conv2d\) has stride \(2, 2\), not 1"),
        (Conv2d(1, 2, 3, dilation=2), r"layer '0.odd' \(Conv2d\) has dilation"),
        (Conv2d(2, 2, 3, groups=2), r"layer '0.odd' \(Conv2d\) has 2 groups"),
        (Conv2d(1, 2, 3, padding=1, padding_mode="circular"), "has padding_mode 'circular'"),
        (Conv2d(1, 2, 2, padding="same"), "has padding 'same' of an even kernel"),
        (MaxPool2d(2, dilation=2), "has dilation 2"),
        (nn.LPPool2d(2, 2, dilation=2), "has dilation 2"),
        (nn.LPPool2d(2, 2, padding=((0, 1), (0, 1))), "has padding .*0, 1"),
        (MaxPool2d(2, return_indices=True), "has return_indices"),
        (torch.nn.LPPool2d(2, 2), r"layer '0.odd' \(LPPool2d\) is not one of the engine's layers"),
        (torch.nn.Dropout(0.5), r"layer '0.odd' \(Dropout\) is not one of"),
        (nn.DivisiveNorm2d(gaussian1d(3)), r"layer '0.odd' \(DivisiveNorm2d\) is not one of"),
        (torch.nn.BatchNorm2d(3), r"layer '0.odd' \(BatchNorm2d\) is not one of"),
        (torch.nn.Flatten(0), "flattens the dimensions 0 to -1"),
        (torch.nn.LogSoftmax(dim=2), "normalises dimension 2"),
        (frozen(), "layer '0.odd' .* has a frozen bias"),
        (hooked(), "layer '0.odd' has hooks"),
        (Linear(3, 4).half(), "layer '0.odd' .* is torch.float16"),
        (Linear(3, 4).double(), "must have one dtype, got torch.float32, torch.float64"),
    ],
    ids=str,
)
def test_what_the_engine_does_not_know(layer, message):
    model = Sequential(Sequential(), Linear(3, 4))
    model[0].add_module("odd", layer)
    with pytest.raises(UnsupportedError, match=f"^OnlineSGD: .*{message}.*autograd loop"):
        OnlineSGD(model)


def test_numbers_in_the_type_that_is_computed_in():
    """Powers and factors that float32 does not have: refused before anything is trained."""

    def last(layer):
        return Sequential(Conv2d(1, 2, 3), layer, Flatten(), Linear(18, 3))

    largest = OnlineSGD(last(nn.LPPool2d(1e39, 2)))
    assert largest._network == OnlineSGD(last(nn.LPPool2d(math.inf, 2)))._network
    with pytest.raises(ValueError, match=r"norm_type must be at least 1\.18e-38"):
        OnlineSGD(last(nn.LPPool2d(1e-39, 2)))
    classes = Sequential(Flatten(), Linear(4, 3), nn.LogSoftmax(1, beta=1e39))
    with pytest.raises(ValueError, match="beta must be finite in the type that is computed in"):
        OnlineSGD(classes)
    OnlineSGD(classes.double())


def test_shared_layers_are_refused():
    layer = Linear(3, 3)
    with pytest.raises(UnsupportedError, match="shares its weight with another layer"):
        OnlineSGD(Sequential(layer, Tanh(), layer))
    with pytest.raises(UnsupportedError, match="no parameters"):
        OnlineSGD(Sequential(Flatten()))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "loss must be 'nll', 'multi_margin', 'mse', got 'hinge'"),
        ({"lr": -1.0}, ValueError, "lr must be >= 0 and finite, got -1.0"),
        ({"momentum": float("inf")}, ValueError, "momentum must be >= 0 and finite"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got str"),
        ({"nesterov": True}, ValueError, "nesterov needs momentum > 0 and dampening 0"),
        ({"threads": 0}, ValueError, "threads must be >= 1, got 0"),
        ({"threads": 1.5}, TypeError, "threads must be an int"),
        ({"threads": "all"}, TypeError, "threads must be an int or 'auto', got 'all'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, error, message):
    with pytest.raises(error, match=f"OnlineSGD: {message}"):
        OnlineSGD(Linear(2, 2), **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": torch.tensor([0, 20])}, r"order must be in \[0, 20\), got 20 at position 1"),
        ({"order": torch.tensor([-1])}, r"order must be in \[0, 20\), got -1"),
        ({"order": torch.tensor([0.0])}, "order must be int64"),
        ({"order": torch.zeros(1, 1).long()}, "order must be int64"),
        ({"labels": torch.full((20,), 4)}, r"labels must be in \[0, 4\), got 4 at position 0"),
        ({"labels": torch.zeros(19).long()}, r"labels must be int64 \(20,\), got"),
        ({"labels": torch.zeros(20)}, "labels must be int64"),
        ({"images": torch.zeros(20, 3, 9)}, "images must be"),
        ({"images": torch.zeros(20, 3, 9, 8).int()}, "images must be float64 or float32"),
        (
            {"images": torch.zeros(20, 2, 9, 8)},
            r"layer '0.0' \(conv2d\): expected a parameter of \(9, 2, 3, 3\) for its input of "
            r"\(2, 9, 8\), got \(9, 3, 3, 3\)",
        ),
        ({"images": torch.zeros(20, 3, 9, 12)}, r"layer '1' \(linear\): expected a parameter of"),
        (
            {"images": torch.zeros(20, 3, 2, 8)},
            r"layer '0.0' \(conv2d\): a kernel of \(3, 3\) does",
        ),
        ({"images": torch.zeros(20, 3, 3, 3)}, r"layer '0.2' \(lp_pool2d\): kernel_size \(2, 2\)"),
        ({"images": torch.zeros(20, 9)}, r"layer '0.0' \(conv2d\): expected a map"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_arguments_that_do_not_fit_change_nothing(arguments, message):
    model = network(nn.LPPool2d(2, 2))
    before = values(model).clone()
    engine = OnlineSGD(model)
    images, labels = samples(3, 9, 8)
    call = {"images": images, "labels": labels, "order": torch.arange(3), **arguments}
    with pytest.raises(RuntimeError, match=f"online_sgd: {message}"):
        engine.run(**call)
    assert torch.equal(values(model), before) and engine.steps == 0


def test_layers_that_do_not_follow_each_other():
    images, labels = samples(1, 4, 4)
    with pytest.raises(RuntimeError, match=r"layer '0' \(linear\): expected a vector.*Flatten"):
        OnlineSGD(Sequential(Linear(4, 4)).double()).run(images, labels, torch.arange(1))
    with pytest.raises(RuntimeError, match="must end in a vector of scores"):
        OnlineSGD(Sequential(Conv2d(1, 4, 4)).double()).run(images, labels, torch.arange(1))
    with pytest.raises(TypeError, match="labels must be a Tensor"):
        OnlineSGD(Sequential(Conv2d(1, 4, 4)).double()).run(images, [1, 2], torch.arange(1))


# -------------------------------------------------------------------- in place of autograd


def fit(model, sgd, generator, engine=None, **options):
    train, test = samples(1, 16, 16, count=30, classes=10), samples(1, 16, 16, classes=10)
    return training.fit(
        model, train, test, epochs=2, optimizer=sgd, generator=generator, engine=engine, **options
    )


def fit_setup(**options):
    torch.manual_seed(1)
    generator = torch7.start(seed=2)
    options = {"widths": (6, 8), "image_size": 16, "dtype": torch.float64} | options
    model = models.convnet(generator=generator, **options)
    return model, SGD(model.parameters(), lr=0.01, lr_decay=1e-4, momentum=0.5), generator


def test_fit_takes_the_engine_and_says_so(capsys):
    histories = []
    for compiled in (True, False):
        model, sgd, generator = fit_setup(dropout=0.5)
        engine = None if compiled else training.AutogradEngine(model, sgd)
        history = fit(model, sgd, generator, engine)
        printed = capsys.readouterr().out
        assert ("compiled online SGD, float64, cpu, 1 thread, batch size 1" in printed) == compiled
        histories.append((history, values(model), sgd.state_dict()))
    (ours, our_values, our_state), (theirs, their_values, their_state) = histories
    assert [r.train_accuracy for r in ours] == [r.train_accuracy for r in theirs]
    assert [r.train_loss for r in ours] == pytest.approx([r.train_loss for r in theirs], rel=1e-12)
    torch.testing.assert_close(our_values, their_values, rtol=0, atol=1e-12)
    assert our_state["param_groups"] == their_state["param_groups"]
    for key, state in their_state["state"].items():
        ours = our_state["state"][key]["velocity"]
        torch.testing.assert_close(ours, state["velocity"], rtol=0, atol=1e-12)


def test_engine_and_autograd_take_turns():
    images, labels = samples(1, 16, 16, classes=10)
    results = []
    for kinds in ("EAEA", "AAAA"):
        model, sgd, _ = fit_setup()
        engines = {"E": OptimizerEngine(model, sgd), "A": training.AutogradEngine(model, sgd)}
        for kind in kinds:
            engines[kind].run(images, labels, torch.arange(10))
            sgd.param_groups[0]["lr"] *= 0.5
        results.append(values(model))
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)


def test_transforms_are_applied_in_order():
    images, labels = samples(1, 16, 16, classes=10)
    order = torch.randperm(20)
    results = []
    for engine_type in (OptimizerEngine, training.AutogradEngine):
        model, sgd, generator = fit_setup()

        def transform(batch, generator=generator):
            assert batch.shape == (1, 1, 16, 16) and batch.dtype == torch.float64
            return batch + generator.normal(0.0, 0.3)

        engine = engine_type(model, sgd, transform=transform)
        losses, predictions = engine.run(images.float(), labels, order)
        results.append(torch.cat([losses, predictions, values(model)]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["function", "noise", "several"])
def test_transform_and_dropout_draw_in_turn(kind):
    """Each sample's numbers for the transform, then those for dropout, as autograd uses them."""
    images, labels = samples(1, 16, 16, classes=10)
    results = []
    for engine_type in (OptimizerEngine, training.AutogradEngine):
        generator = torch7.start(1)
        model = models.convnet(
            (3, 4, 8), image_size=16, kernel_size=3, dropout=0.4, dtype=torch.float64,
            generator=generator,
        )  # fmt: skip
        transform = {
            "function": lambda image, g=generator: image * (1 + 0.1 * g.uniform(0.0, 1.0)),
            "noise": transforms.GaussianNoise(0.1, generator),
            "several": transforms.Compose(
                transforms.RandomRotation(0.3, generator),
                transforms.GaussianNoise(0.1, generator),
                transforms.RandomRotation(0.1, torch7.Generator(2)),
            ),
        }[kind]
        engine = engine_type(model, SGD(model.parameters(), lr=0.05), transform=transform)
        losses = [engine.run(images, labels, part)[0] for part in torch.arange(20).split(7)]
        words = torch.from_numpy(generator.random32(3).astype(float))
        results.append(torch.cat([*losses, values(model), words]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


def test_when_fit_stays_with_autograd():
    model, sgd, generator = fit_setup()
    choose = training.choose_engine
    assert isinstance(choose(model, sgd), OptimizerEngine)
    assert "not compiled" not in choose(model, sgd, batch_size=4).description
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    two = SGD([{"params": [p]} for p in model.parameters()])
    some = SGD(list(model.parameters())[:2])
    dropping = models.convnet((6, 8), dropout=0.5, generator=generator)
    both = choose(dropping, SGD(dropping.parameters()), transform=lambda batch: batch)
    assert isinstance(both, OptimizerEngine)
    for engine, reason in [
        (choose(model, other), "the optimizer is SGD, not SGD"),
        (choose(model, two), "the optimizer has several parameter groups"),
        (choose(model, some), "the optimizer's parameters are not those of the network"),
        (choose(model, sgd, torch.nn.functional.nll_loss), "the criterion nll_loss is not one of"),
    ]:
        assert isinstance(engine, training.AutogradEngine)
        assert f"(not compiled: {reason}" in engine.description
    assert set(online.LOSSES) == set(CRITERIA)


@pytest.mark.parametrize("kind", [SGD, training.AveragedSGD])
@pytest.mark.parametrize("part", ["rate", "step", "_update", "_momentum"])
def test_what_a_subclass_overrides_is_done(kind, part):
    """Here nothing, so that the weights stay; the class itself is the engine's."""
    model, _, _ = fit_setup()
    nothing = {"rate": 0.0, "_momentum": [torch.zeros_like(p) for p in model.parameters()]}
    other = type("Other", (kind,), {part: lambda *_: nothing.get(part)})
    choose, before = training.choose_engine, values(model).clone()
    images, labels = samples(1, 16, 16, classes=10)
    for optimizer, changes in ((other, False), (kind, True)):
        engine = choose(model, optimizer(model.parameters(), lr=0.01, momentum=0.5))
        assert isinstance(engine, OptimizerEngine) == changes
        engine.run(images, labels, torch.arange(2))
        assert torch.equal(values(model), before) != changes


@pytest.mark.parametrize("faster", [1, 2])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("checked", [False, True])
def test_the_faster_number_of_threads_is_taken(monkeypatch, faster, several, checked):
    """And changes nothing: the trials are made on copies, and any number gives the same bits."""
    images, labels = samples(1, 20, 20, classes=10)
    order = torch.randint(0, 20, (40,))
    tried = []
    really = OnlineSGD._time_steps

    def time_steps(self, images, threads):
        tried.append(threads)
        assert really(self, images, threads) > 0
        return 1.0 if threads == faster else 2.0

    monkeypatch.setattr(OnlineSGD, "_time_steps", time_steps)
    results = []
    for threads in (1, "auto"):
        model, generator, _ = chunked_setup()
        model.eval()
        one = OnlineSGD(model, lr=0.02, momentum=0.5, threads=threads)
        engine = OnlineSGD.of_engines([one]) if several else one
        torch.set_num_threads(2)
        try:
            if threads == "auto":
                assert "cpu, 1 thread or all, batch size 1" in engine.description
                if checked:
                    engine.check(images)
                    assert one.threads == faster and not model.training
            losses, classes = engine.run(images, labels, order)
        finally:
            torch.set_num_threads(1)
        words = torch.from_numpy(generator.random32(3).astype(float))
        results.append((losses, classes, values(model), words, one.steps))
        results[-1] += tuple(one.velocities)
    assert one.threads == faster and set(tried) == {1, 2}
    plural = "s" * (faster > 1)
    assert f"float64, cpu, {faster} thread{plural}, batch size 1" in engine.description
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(expected))


def test_one_thread_is_not_timed(monkeypatch):
    monkeypatch.setattr(OnlineSGD, "_time_steps", lambda *_: pytest.fail("timed"))
    model, sgd, _ = fit_setup()
    images, labels = samples(1, 16, 16, classes=10)
    engine = training.choose_engine(model, sgd, images=images)
    assert "cpu, 1 thread, batch size 1" in engine.description
    engine.run(images, labels, torch.arange(2))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("which", ["images", "labels", "order"])
def test_tensors_elsewhere_change_nothing(which, dropout, several):
    """A meta tensor sends the operator to its fake kernel: no step was made, but counted."""
    made = [
        models.convnet((2, 3, 4), dropout=dropout, generator=torch7.start(seed)).double()
        for seed in (1, 2)
    ]
    before = [values(model).clone() for model in made]
    engine = OnlineSGD(made if several else made[0], momentum=0.5)
    images, labels = samples(1, 32, 32)
    call = {"images": images, "labels": labels, "order": torch.arange(3)}
    state = engine.state_dict()
    made[0].eval()
    for wrong, message in (
        (call[which].to("meta"), f"{which} must be on cpu, got meta"),
        (call[which].to(torch.int32), f"{which} must be .*got torch.int32"),
        (call[which].to_sparse(), f"{which} must be .*sparse"),
    ):
        with pytest.raises(RuntimeError, match=f"online_sgd: {message}"):
            engine.run(**call | {which: wrong})
    assert all(torch.equal(values(m), b) for m, b in zip(made, before, strict=True))
    assert str(engine.state_dict()) == str(state) and not made[0].training


def test_the_raw_operators_fake_compares_devices():
    model = Linear(3, 2)
    for where in range(8):
        tensors = [
            [p.detach() for p in model.parameters()], [], "linear 2 1 0", [],
            torch.zeros(4, 3), torch.zeros(4).long(), torch.arange(2),
            torch.zeros(0, dtype=torch.float64),
        ]  # fmt: skip
        if isinstance(tensors[where], str) or tensors[where] == []:
            continue
        one = tensors[where]
        tensors[where] = [one[0].to("meta"), one[1]] if isinstance(one, list) else one.to("meta")
        with pytest.raises(RuntimeError, match=r"all tensors must be on one device, got cpu, meta"):
            torch.ops.mnist_ops.online_sgd(*tensors, 0, 0, 0.1, 0.0, 0.0, 0.0, 0.0, False, False, 1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": 10**400}, ValueError, "lr is too large for a float"),
        ({"threads": 10**30}, ValueError, r"threads must fit 64 bits"),
        ({"threads": True}, TypeError, "threads must be an int, got True"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number, got NoneType"),
    ],
)
def test_absurd_settings(settings, error, message):
    with pytest.raises(error, match=f"OnlineSGD: {message}"):
        OnlineSGD(Linear(2, 2), **settings)


def test_numbers_of_numpy():
    images, labels = samples(3)
    plain, numpy = (Sequential(Linear(3, 4)).double() for _ in range(2))
    numpy.load_state_dict(plain.state_dict())
    OnlineSGD(plain, lr=0.5, threads=1).run(images, labels, torch.arange(20))
    OnlineSGD(numpy, lr=np.float32(0.5), threads=np.int64(1)).run(images, labels, torch.arange(20))
    assert torch.equal(values(plain), values(numpy))


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -1.0])
def test_a_rate_set_later(worst):
    model = Linear(3, 4).double()
    sgd = SGD(model.parameters(), lr=0.1)
    engine, before = OptimizerEngine(model, sgd), values(model).clone()
    sgd.param_groups[0]["lr"] = worst
    with pytest.raises(ValueError, match="lr must be >= 0 and finite"):
        engine.run(*samples(3), torch.arange(3))
    assert torch.equal(values(model), before)


def test_check_changes_nothing():
    model = network(nn.LPPool2d(2, 2))
    engine, before = OnlineSGD(model, momentum=0.5), values(model).clone()
    images, _ = samples(3, 9, 8)
    engine.check(images)
    for wrong in (images[:, :2], images[:, :, :3, :3], images.int(), images.to("meta"), images[0]):
        with pytest.raises(UnsupportedError, match="online_sgd"):
            engine.check(wrong)
    assert torch.equal(values(model), before) and engine.steps == 0 and engine.velocities == []
    several = OnlineSGD([copy.deepcopy(model), model])
    several.check(images)
    with pytest.raises(UnsupportedError):
        several.check(images[:, :2])


def raw_arguments():
    """Arguments of the raw operator for a convolution with a normalization and a linear layer."""
    model = Sequential(
        Conv2d(1, 3, 3), nn.SubtractiveNorm2d(gaussian1d(3)), Flatten(), Linear(27, 4)
    ).double()
    images, labels = samples(1, 5, 5)
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "velocities": [],
        "network": OnlineSGD(model)._network,
        "kernels": [model[1].kernel],
        "images": images,
        "labels": labels,
        "order": torch.arange(5),
        "uniform": torch.empty(0, dtype=torch.float64),
        "loss": 0,
        "step": 0,
        "lr": 0.1,
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
        "started": False,
        "threads": 1,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"momentum": 0.5}, "velocities go with a momentum, and only with one"),
        ({"lr": math.nan}, "must be finite, got nan"),
        ({"weight_decay": math.inf}, "must be finite, got inf"),
        ({"threads": 2**63 - 1}, r"threads must be in \[1, 2\^20\], got 9223372036854775807"),
        ({"threads": 0}, r"threads must be in \[1, 2\^20\], got 0"),
        ({"step": -1}, r"step must be in \[0, 2\^53\], got -1"),
        ({"step": 2**62}, r"step must be in \[0, 2\^53\]"),
        ({"loss": 3}, "loss must be 0, 1 or 2, got 3"),
        ({"images": torch.zeros(20, 1, 0, 5)}, "expected between 1 and 2\\^40 elements"),
        ({"kernels": [torch.ones(3, dtype=torch.int64)]}, "kernel must be a floating-point tensor"),
        ({"kernels": [torch.ones(4)]}, "kernel sizes must be odd"),
        ({"kernels": []}, "its kernel was not given"),
        ({"network": "linear 99999999999 1 0"}, "expected a vector, got a map"),
        ({"network": "max_pool2d 4611686018427387904"}, "has no number where one must be"),
        ({"network": "conv2d"}, "has no number where one must be"),
        ({"network": ""}, "the network has no layers"),
        ({"parameters": []}, "the network has no parameters"),
    ],
    ids=str,
)
def test_the_raw_operator_refuses(wrong, message):
    right = raw_arguments()
    before = [p.clone() for p in right["parameters"]]
    with pytest.raises(RuntimeError, match=message) as refused:
        torch.ops.mnist_ops.online_sgd(*(right | wrong).values())
    assert "online_sgd" in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip(right["parameters"], before, strict=True))
    torch.ops.mnist_ops.online_sgd(*right.values())


def test_parameters_that_cannot_be_written_are_refused_before_the_run():
    """A leaf that requires grad is copied, as it is not contiguous, and cannot be copied to."""
    arguments = raw_arguments()
    weight = arguments["parameters"][-2]
    arguments["parameters"][-2] = weight.t().contiguous().t().requires_grad_()
    before = [p.detach().clone() for p in arguments["parameters"]]
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        torch.ops.mnist_ops.online_sgd(*arguments.values())
    assert all(torch.equal(a, b) for a, b in zip(arguments["parameters"], before, strict=True))
