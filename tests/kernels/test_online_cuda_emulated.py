"""Online SGD on CUDA without a GPU: csrc/cuda/online_*, emulated, against the CPU's engine.

The emulator runs the very code of the device (test_cuda_emulator.py says what that shows and what
it does not), here with cooperative launches too: the threads of all blocks are there at once, and
blocks take turns, in random order, where they wait for each other. Blocks have 64 threads unless a
test says otherwise, on a GPU 512; the code knows no number.

Each network is trained by the CPU's engine and by the kernel.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import math

import pytest
import torch
from test_cuda_emulator import _memory_filled_with_nan
from test_online import LAYERS, fit, fit_setup, network, offset_network, samples, values
from torch import Tensor
from torch.nn import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential, Tanh

from mnist_ops import gaussian1d, nn, torch7
from mnist_ops.mnist import models
from mnist_ops.training import OptimizerEngine
from mnist_ops.training.online import LOSSES, OnlineSGD

__all__ = ["_memory_filled_with_nan"]  # a fixture for all tests

pytestmark = pytest.mark.usefixtures("one_thread")


class Device:
    """The emulated device: engines are put on it, and what they run on can be changed."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def set(
        self,
        multiprocessors: int = 3,
        block_threads: int = 64,
        seed: int = 0,
        shared_bytes: int = 200 << 10,
    ) -> None:
        memory = ctypes.c_int64(shared_bytes)
        self.library.configure_emulated_device(multiprocessors, block_threads, memory)
        everything = (ctypes.c_int64(2**62), ctypes.c_int64(2**31 - 1))
        self.library.configure_cuda_emulator(*everything, ctypes.c_uint32(seed))

    def put(self, engine: OnlineSGD) -> OnlineSGD:
        """Make the engine one on "CUDA"."""
        for each in (engine, *engine.engines):
            each._operator = torch.ops.mnist_ops_emulated.online_sgd_models
        return engine


@pytest.fixture(scope="module")
def emulated(emulated_cuda: ctypes.CDLL) -> Device:
    return Device(emulated_cuda)


def compare(
    emulated: Device,
    model: torch.nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int = 12,
    tolerance: float = 1e-12,
    loss: str = "nll",
    **settings: object,
) -> None:
    """Train copies of the model, and hold losses, predictions and all state side by side."""
    order = torch.randint(0, len(images), (steps,))
    expected_model = copy.deepcopy(model)
    expected_engine = OnlineSGD(expected_model, loss, **settings)
    expected = expected_engine.run(images, labels, order)
    ours = copy.deepcopy(model)
    engine = emulated.put(OnlineSGD(ours, loss, **settings))
    losses, predictions = engine.run(images, labels, order)
    assert losses.dtype == expected[0].dtype and losses.shape == (steps,)
    scale = max(1.0, expected[0].abs().max().item())
    torch.testing.assert_close(losses, expected[0], rtol=0, atol=tolerance * scale)
    assert torch.equal(predictions, expected[1])
    state = list(zip(ours.parameters(), expected_model.parameters(), strict=True))
    state += zip(engine.velocities, expected_engine.velocities, strict=True)
    for got, wanted in state:
        bound = tolerance * max(wanted.abs().max().item(), 1e-3)
        torch.testing.assert_close(got, wanted, rtol=0, atol=bound)
    assert engine.steps == steps


# ------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["64", "32"]
)
def test_original_network(emulated, dtype, tolerance):
    emulated.set(5, 128)
    model = models.convnet(dtype=dtype, generator=torch7.start(seed=1))
    images, labels = samples(1, 32, 32, classes=10)
    compare(emulated, model, images, labels, steps=2, tolerance=tolerance, lr=0.02)


def test_a_thousand_steps(emulated):
    """1e-9 after 1,000 steps in float64, whole graphs and the steps that are left over."""
    emulated.set(2, 32)
    body = Sequential(Conv2d(1, 3, 3), Tanh(), nn.LPPool2d(2, 2))
    body.append(nn.SubtractiveNorm2d(gaussian1d(3)))
    model = Sequential(body, Flatten(), Linear(12, 5), Tanh(), Linear(5, 3), torch7.LogSoftmax())
    images, labels = samples(1, 6, 6, classes=3)
    compare(emulated, model.double(), images, labels, steps=1000, tolerance=1e-9, lr=0.05)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("nll", {"activation": "relu", "log_softmax": "exact"}),
        ("multi_margin", {"log_softmax": None}),
        ("mse", {"log_softmax": None, "output_activation": "tanh"}),
        ("nll", {"kernel_size": 3, "padding": 1, "widths": (9, 10, 8, 12)}),
        ("nll", {"dropout": 0.5, "norm_kernel": None, "pooling": "max"}),
    ],
    ids=["relu", "multi-margin", "mse", "three stages", "dropout"],
)
def test_variants_of_the_reports(emulated, loss, options):
    emulated.set(4, 96)
    options = {"widths": (10, 9, 12), "image_size": 16} | options
    model = models.convnet(dtype=torch.float64, generator=torch7.start(seed=3), **options)
    images, labels = samples(1, 16, 16, classes=10)
    compare(emulated, model, images, labels, steps=4, loss=loss, lr=0.01, lr_decay=1e-3)


# ------------------------------------------------------------------------------------ each layer


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layer(emulated, layer):
    emulated.set()
    model = network(copy.deepcopy(layer))
    lr = 1e-6 if getattr(layer, "norm_type", 1) < 1 else 0.02
    compare(emulated, model, *samples(3, 9, 8), steps=3, lr=lr)


FIRST = {
    "conv padded": lambda c: Conv2d(c, 4, 5, padding=2),
    "conv many channels": lambda c: Conv2d(c, 40, 2, bias=False),
    "norm": lambda c: nn.SubtractiveNorm2d(gaussian1d(5)),
    "norm with a 2-D kernel": lambda c: nn.SubtractiveNorm2d(torch.rand(3, 5)),
    "LP pool": lambda c: nn.LPPool2d(3, 2, 1),
    "max pool": lambda c: MaxPool2d((3, 2), 2, padding=1, ceil_mode=True),
    "dropout": lambda c: torch7.Dropout(0.3, torch7.Generator(7)),
    "relu": lambda c: ReLU(),
    "norm, conv": lambda c: Sequential(
        nn.SubtractiveNorm2d(gaussian1d(3)), Conv2d(c, 5, 3), Tanh()
    ),
}


@pytest.mark.parametrize("channels", [1, 9])
@pytest.mark.parametrize("layer", FIRST.values(), ids=FIRST)
def test_layer_first(emulated, layer, channels):
    """Before any parameters, where no gradient is wanted; one channel and several."""
    emulated.set()
    body = Sequential(layer(channels), Flatten()).double()
    features = body.eval()(torch.zeros(1, channels, 7, 6, dtype=torch.float64)).shape[1]
    model = Sequential(body, Linear(features, 4), nn.LogSoftmax()).double()
    compare(emulated, model, *samples(channels, 7, 6), steps=3, lr=0.02)


@pytest.mark.parametrize(
    "last",
    [torch7.LogSoftmax(), nn.LogSoftmax(beta=-1.5), Tanh(), torch.nn.Identity()],
    ids=["torch7", "exact", "tanh", "none"],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_ends_and_losses(emulated, loss, last):
    emulated.set()
    model = Sequential(Linear(11, 13), nn.Sigmoid(), Linear(13, 37, bias=False), last).double()
    images, labels = samples(11, classes=37)
    compare(emulated, model, images, labels, loss=loss, steps=5, lr=0.005)


def test_a_common_offset_of_the_scores_costs_no_digits(emulated):
    emulated.set()
    for beta in (1.0, -0.75, 2.5):
        model, images, labels, losses, _ = offset_network(beta, torch.float32)
        engine = emulated.put(OnlineSGD(model, "nll", lr=0.0))
        got, _ = engine.run(images, labels, torch.arange(6))
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(got.double(), losses, rtol=4 * eps, atol=0)


def test_networks_that_are_unlike_the_original(emulated):
    emulated.set()
    compare(emulated, Linear(5, 3).double(), *samples(5, classes=3), loss="mse", lr=0.01)
    model = Sequential(Linear(700, 66), Tanh(), Tanh(), Linear(66, 1)).double()
    compare(emulated, model, *samples(700, classes=1), loss="mse", lr=1e-3)
    model = Sequential(Tanh(), ReLU(), torch7.LogSoftmax(), Linear(6, 4)).double()
    compare(emulated, model, *samples(6), loss="multi_margin", lr=0.1)
    model = network(nn.LPPool2d(2, 2), Tanh(), MaxPool2d(2), nn.Sigmoid(), ReLU())
    compare(emulated, model, *samples(3, 9, 8), lr=0.1)
    model = Sequential(Conv2d(2, 7, 2), Flatten(), torch.nn.LogSoftmax(dim=1)).double()
    compare(emulated, model, *samples(2, 3, 3, classes=28), lr=0.1)


def test_more_than_a_block_holds(emulated):
    """Weights, planes and vectors too large for a block's own memory are read where they are."""
    emulated.set(2, 64)
    norm = nn.SubtractiveNorm2d(gaussian1d(5))
    wide = Sequential(Conv2d(600, 3, 3), Tanh(), Flatten(), Linear(3, 2)).double()
    compare(emulated, wide, *samples(600, 3, 3, classes=2), loss="mse", steps=2, lr=1e-3)
    large = Sequential(Conv2d(1, 2, 2), norm, Conv2d(2, 1, 40), Flatten(), Linear(1, 2)).double()
    compare(emulated, large, *samples(1, 41, 41, classes=2), loss="mse", steps=2, lr=1e-6)
    pixels = Sequential(Conv2d(1, 1, 2), MaxPool2d(69), Flatten(), Linear(1, 2)).double()
    compare(emulated, pixels, *samples(1, 70, 70, classes=2), loss="mse", steps=2, lr=1e-4)
    long = Sequential(Linear(2, 4200), Tanh(), Linear(4200, 300), Tanh(), Linear(300, 2)).double()
    compare(emulated, long, *samples(2, classes=2), loss="mse", steps=1, lr=1e-4)


TILED = {
    "as in the reports": [
        *(Conv2d(1, 32, 5), Tanh(), nn.LPPool2d(2, 2), nn.SubtractiveNorm2d(gaussian1d(3))),
        *(Conv2d(32, 32, 5), Tanh(), nn.LPPool2d(2, 2), nn.SubtractiveNorm2d(gaussian1d(5))),
    ],
    "padded, odd sizes": [
        *(Conv2d(2, 32, 5, padding=2), ReLU(), nn.SubtractiveNorm2d(gaussian1d(11))),
        *(Conv2d(32, 9, 5, padding=1, bias=False), Tanh()),
    ],
    "unequal padding, three deep": [
        *(Conv2d(3, 32, 5, padding=(3, 1)), nn.SubtractiveNorm2d(torch.rand(3, 5)), Tanh()),
        *(Conv2d(32, 32, 5, padding=(0, 2)), nn.LPPool2d(2, 2)),
        *(Conv2d(32, 5, 5, padding=6), nn.Sigmoid(), nn.SubtractiveNorm2d(gaussian1d(3))),
    ],
    "pools that are not fused": [
        *(Conv2d(1, 32, 5), MaxPool2d(2), Conv2d(32, 34, 5), Tanh(), nn.LPPool2d(2, 2, 1)),
    ],
    "an image of many channels": [
        *(nn.SubtractiveNorm2d(gaussian1d(3)), Conv2d(32, 6, 5, padding=2), Tanh()),
        nn.SubtractiveNorm2d(gaussian1d(3)),
    ],
    "an image of few channels": [
        *(nn.SubtractiveNorm2d(gaussian1d(3)), Conv2d(4, 6, 5, padding=(1, 2)), nn.LPPool2d(2, 2)),
    ],
}


@pytest.mark.parametrize("kilobytes", [200, 64, 35])
@pytest.mark.parametrize("layers", TILED.values(), ids=TILED)
def test_tiles(emulated, layers, kilobytes):
    """Convolutions whose operands fit into a block's own memory, all of them, some, or few."""
    body = Sequential(*copy.deepcopy(layers), Flatten()).double()
    channels = next(each.in_channels for each in layers if isinstance(each, Conv2d))
    height, width = (20, 16) if channels == 1 else (8, 10)
    features = body(torch.zeros(1, channels, height, width, dtype=torch.float64)).shape[1]
    model = Sequential(body, Linear(features, 4), Tanh(), Linear(4, 4), nn.LogSoftmax()).double()
    images, labels = samples(channels, height, width)
    for multiprocessors, momentum in ((3, 0.0), (40, 0.5)):
        emulated.set(multiprocessors, 64, shared_bytes=kilobytes << 10)
        compare(emulated, model, images, labels, steps=2, lr=0.02, momentum=momentum)
    emulated.set(2, 96, shared_bytes=kilobytes << 10)
    compare(emulated, model.float(), images, labels, steps=2, lr=0.02, tolerance=1e-5)


def test_as_many_layers_as_one_likes(emulated):
    """Of more phases than a block keeps of the program."""
    emulated.set()
    model = Sequential(*itertools.chain(*[(Linear(5, 5), Tanh()) for _ in range(30)])).double()
    images, labels = samples(5, classes=5)
    compare(
        emulated, model, images, labels, 3, loss="mse", lr=0.1
    )  # more phases than a block keeps


# -------------------------------------------------------------- optimizer, dtypes, devices, runs


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_decay": 0.1},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.5, "dampening": 0.25, "weight_decay": 0.01, "lr_decay": 0.01},
        {"momentum": 0.5, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_settings_of_sgd(emulated, settings, dtype):
    emulated.set()
    body = Sequential(Conv2d(3, 9, 3), Tanh(), nn.LPPool2d(2, 2), Conv2d(9, 6, 2), Flatten())
    model = Sequential(body, Linear(24, 7), Tanh(), Linear(7, 4), torch7.LogSoftmax()).to(dtype)
    images, labels = samples(3, 8, 8)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    compare(emulated, model, images, labels, tolerance=tolerance, lr=0.02, **settings)


def test_images_and_parameters_of_any_strides(emulated):
    emulated.set()
    model = network(Conv2d(9, 5, 3)).to(memory_format=torch.channels_last)
    model[1].weight.data = model[1].weight.data.t().contiguous().t()
    images, labels = samples(18, 3, 8, count=40, dtype=torch.float32)
    images = images[:, ::2].transpose(1, 2)[::2]
    compare(emulated, model, images, labels[1::2], lr=0.02, momentum=0.5)
    assert not model[1].weight.is_contiguous()


@pytest.mark.parametrize("widths", [(9, 10, 12), (32, 33, 12)], ids=str)
def test_the_device_changes_no_bit(emulated, widths):
    """However many blocks there are, and in whatever order blocks and threads run."""
    images, labels = samples(1, 16, 16, classes=10)
    order = torch.randint(0, 20, (5,))
    found = []
    for multiprocessors, seed in [(1, 0), (2, 1), (7, 2), (40, 3)]:
        emulated.set(multiprocessors, 64, seed)
        model = models.convnet(widths, image_size=16, generator=torch7.start(seed=1))
        losses, _ = emulated.put(OnlineSGD(model, lr=0.05)).run(images, labels, order)
        found.append(torch.cat([losses, values(model)]))
    assert all(torch.equal(found[0], other) for other in found)


def test_windows_of_zeros_and_of_tiny_and_huge_numbers(emulated):
    emulated.set()
    for dtype, scale in itertools.product((torch.float64, torch.float32), (0, -1, 1)):
        limit = torch.finfo(dtype)
        factor = {0: 1.0, -1: limit.tiny**0.6, 1: limit.max**0.6}[scale]
        model = Sequential(
            Conv2d(1, 9, 3, bias=False), ReLU(), nn.LPPool2d(2, 2), Flatten(), Linear(81, 4), Tanh()
        ).to(dtype)
        with torch.no_grad():
            model[4].weight /= factor
        images, labels = samples(1, 8, 8)
        lr = 1e-3 if scale == 0 else 0.0
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
        compare(emulated, model, images * factor, labels, 4, tolerance, "mse", lr=lr)


def test_nan_is_reported_not_hidden(emulated):
    emulated.set()
    for layers in ([nn.LPPool2d(2, 2), nn.SubtractiveNorm2d(gaussian1d(3))], [MaxPool2d(2)]):
        images, labels = samples(3, 9, 8)
        images[3, 1, 4, 4] = torch.nan
        engine = emulated.put(OnlineSGD(network(*layers)))
        losses, predictions = engine.run(images, labels, torch.arange(3, 5))
        assert losses.isnan().all()
        assert ((predictions >= 0) & (predictions < 4)).all()


def dropping(seed=1):
    generator = torch7.start(seed)
    return models.convnet(
        (5, 8, 12), dropout=0.25, generator=generator, dtype=torch.float64, image_size=16
    )


def test_chunks_and_saved_states_change_nothing(emulated, tmp_path):
    emulated.set()
    images, labels = samples(1, 16, 16, classes=10)
    order = torch.randint(0, 20, (30,))
    settings = {"lr": 0.02, "momentum": 0.5}
    whole = emulated.put(OnlineSGD(dropping(), **settings)).run(images, labels, order)
    expected = OnlineSGD(dropping(), **settings).run(images, labels, order)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)

    model = dropping()
    engine = emulated.put(OnlineSGD(model, **settings))
    first = [engine.run(images, labels, piece) for piece in order[:15].split([1, 7, 7, 0])]
    torch.save({"model": model.state_dict(), "engine": engine.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = dropping(seed=2)
    resumed.load_state_dict(state["model"])
    again = emulated.put(OnlineSGD(resumed, **settings))
    again.load_state_dict(state["engine"])
    parts = [*first, again.run(images, labels, order[15:])]
    for got, wanted in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(got), wanted)


def test_in_place_of_autograd(emulated):
    """Behind training.fit, with the optimizer's state and a transform, as on the CPU."""
    emulated.set()
    histories = []
    for on_device in (True, False):
        model, sgd, generator = fit_setup()
        engine = OptimizerEngine(model, sgd, transform=lambda batch: batch * 0.5)
        if on_device:
            emulated.put(engine)
            assert engine.chunk == 2000
        histories.append((fit(model, sgd, generator, engine, chunk=11), values(model), sgd))
    (ours, our_values, our_sgd), (theirs, their_values, their_sgd) = histories
    assert [r.train_accuracy for r in ours] == [r.train_accuracy for r in theirs]
    torch.testing.assert_close(our_values, their_values, rtol=0, atol=1e-12)
    assert our_sgd.param_groups[0]["steps"] == their_sgd.param_groups[0]["steps"] == 60
    for state, other in zip(our_sgd.state.values(), their_sgd.state.values(), strict=True):
        torch.testing.assert_close(state["velocity"], other["velocity"], rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------- several models


@pytest.mark.parametrize("multiprocessors", [1, 2, 7])
def test_several_models_at_once(emulated, multiprocessors):
    """Each with its order, settings, kernels and random numbers, as if it were alone."""
    images, labels = samples(1, 16, 16, classes=10)
    order = torch.randint(0, 20, (3, 6))
    rates, decays = [0.02, 0.05, 0.01], [0.0, 0.1, 0.01]
    networks = [dropping(seed) for seed in (1, 2, 3)]
    networks[1].stage1.kernel.mul_(torch.rand(7) + 0.5)
    alone = copy.deepcopy(networks)
    emulated.set(multiprocessors)
    settings = {"lr_decay": 0.01, "momentum": 0.5}
    engine = OnlineSGD(networks, lr=rates, weight_decay=decays, **settings)
    assert engine.description.endswith("3 models at once")
    emulated.put(engine)
    parts = [engine.run(images, labels, piece) for piece in order.split([2, 4], dim=1)]
    losses, predictions = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    assert losses.shape == predictions.shape == (3, 6)
    for i, model in enumerate(alone):
        one = emulated.put(OnlineSGD(model, lr=rates[i], weight_decay=decays[i], **settings))
        expected = one.run(images, labels, order[i])
        assert torch.equal(losses[i], expected[0]) and torch.equal(predictions[i], expected[1])
        assert torch.equal(values(networks[i]), values(model))
        assert engine.engines[i].steps == 6
        for got, wanted in zip(engine.engines[i].velocities, one.velocities, strict=True):
            assert torch.equal(got, wanted)


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": torch.tensor([0, 20])}, r"order must be in \[0, 20\), got 20 at position 1"),
        ({"order": torch.tensor([3, -1, 99])}, r"order must be in \[0, 20\), got -1 at position 1"),
        ({"order": torch.tensor([0.0])}, "order must be int64"),
        ({"order": torch.zeros(1, 1).long()}, "order must be int64"),
        ({"labels": torch.full((20,), 4)}, r"labels must be in \[0, 4\), got 4 at position 0"),
        ({"labels": torch.full((20,), -(2**62))}, r"labels must be in \[0, 4\), got -"),
        ({"labels": torch.zeros(19).long()}, r"labels must be int64 \(20,\), got"),
        ({"images": torch.zeros(20, 3, 9)}, "images must be"),
        ({"images": torch.zeros(20, 3, 9, 8).int()}, "images must be float64 or float32"),
        (
            {"images": torch.zeros(20, 2, 9, 8)},
            r"layer '0.0' \(conv2d\): expected a parameter of \(9, 2, 3, 3\) for its input of "
            r"\(2, 9, 8\), got \(9, 3, 3, 3\)",
        ),
        ({"images": torch.zeros(20, 3, 3, 3)}, r"layer '0.2' \(lp_pool2d\): kernel_size \(2, 2\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_arguments_that_do_not_fit_change_nothing(emulated, arguments, message, momentum):
    emulated.set()
    model = network(nn.LPPool2d(2, 2))
    before = values(model).clone()
    engine = emulated.put(OnlineSGD(model, momentum=momentum))
    images, labels = samples(3, 9, 8)
    call = {"images": images, "labels": labels, "order": torch.arange(3), **arguments}
    with pytest.raises(RuntimeError, match=f"online_sgd(_models)?: {message}"):
        engine.run(**call)
    assert torch.equal(values(model), before) and engine.steps == 0 and engine.velocities == []


def test_kernels_without_a_sum_are_refused(emulated):
    emulated.set()
    for kernel in (torch.tensor([1.0, -2.0, 1.0]), torch.tensor([1.0, torch.inf, 1.0])):
        model = network(nn.SubtractiveNorm2d(gaussian1d(3)), nn.LPPool2d(2, 2))
        model[0][2].kernel.copy_(kernel)
        with pytest.raises(RuntimeError, match="the kernel's sum must be finite and not 0"):
            emulated.put(OnlineSGD(model)).run(*samples(3, 9, 8), torch.arange(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({3: 0.5}, "velocities go with a momentum, and only with one"),
        ({0: math.nan}, "settings must be finite, got nan"),
    ],
)
def test_the_raw_operator_refuses_settings(emulated, wrong, message):
    """The first read through a null pointer."""
    emulated.set()
    model = torch.nn.Linear(3, 2).double()
    settings = torch.zeros(1, 7, dtype=torch.float64)
    for i, number in wrong.items():
        settings[0, i] = number
    arguments = [
        [p.detach().clone() for p in model.parameters()],
        [],
        OnlineSGD(model)._network,
        [],
        torch.randn(4, 3, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
        torch.arange(3).unsqueeze(0),
        torch.empty(0, dtype=torch.float64),
        *(0, settings, False),
    ]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mnist_ops_emulated.online_sgd_models(*arguments)
    arguments[9] = torch.zeros(1, 7, dtype=torch.float64)
    torch.ops.mnist_ops_emulated.online_sgd_models(*arguments)
