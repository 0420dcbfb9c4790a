"""The result script as users run it, and what it is made of: models, images, files of all kinds."""

import gzip
import importlib.util
import io
import pickle
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from torch7_writer import Object, long_storage, save, sequential

from mnist_ops import data, models, optim, prediction, torch7, training

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "predict.py"
FLOAT32_NET = REFERENCE / "torch7" / "model_nonorm_epoch1.float32.net.xz"


@pytest.fixture(autouse=True)
def threads():
    """Runs in this process set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*flags):
    """The script in a process of its own."""
    command = [sys.executable, str(SCRIPT), *map(str, flags), "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def run_here(monkeypatch, *flags):
    """The script's exit code, without a process of its own."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restored afterwards
    spec = importlib.util.spec_from_file_location("predict", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.main()
    except SystemExit as stop:  # argparse's way out
        return stop.code


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A tiny data set in MNIST's format, whose digits are noise."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 25)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = struct.pack(">4I", 2051, count, 28, 28) + pixels.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        content = struct.pack(">2I", 2049, count) + labels.tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(content)
    return folder


def checkpoint(folder, mnist, normalization=None, kernel=7, **network):
    """A checkpoint that fit wrote before its first epoch, and its network."""
    generator = torch7.start(1)
    model = models.convnet(dtype=torch.float64, generator=generator, **network)
    splits = data.prepare("global", root=mnist)
    settings = {"mean": splits.mean, "std": splits.std}
    if network:
        settings["network"] = network
    if normalization is not None:
        settings |= {"normalization": normalization, "data_kernel": kernel}
    training.fit(
        model,
        (splits.train_images, splits.train_labels),
        (splits.test_images, splits.test_labels),
        epochs=0,
        optimizer=optim.Torch7SGD(model.parameters()),
        generator=generator,
        folder=folder,
        settings=settings,
        verbose=False,
    )
    return folder / "checkpoint.pt", model.eval()


def expected_predictions(model, mnist, normalization, kernel=7, split="test"):
    """The way that training.evaluate would predict."""
    splits = data.prepare(normalization, kernel, root=mnist)
    with torch.no_grad():
        return model(getattr(splits, f"{split}_images").double()).argmax(1)


def pixels_net(dtype=np.float64):
    """A network of Torch7 that sees the brightest of ten pixels, in row 10, columns 10 to 19."""
    weight = np.zeros((10, 32 * 32), dtype)
    weight[np.arange(10), (10 + 2) * 32 + 10 + 2 + np.arange(10)] = 1
    return sequential(
        Object("nn.Reshape", size=long_storage(1024)),
        Object("nn.Linear", weight=weight, bias=np.zeros(10, dtype)),
        Object("nn.LogSoftMax"),
    )


def bright(classes):
    """Images for :func:`pixels_net`."""
    images = torch.zeros(len(classes), 28, 28, dtype=torch.uint8)
    images[torch.arange(len(classes)), 10, 10 + torch.as_tensor(classes)] = 255
    return images


class TestOriginal:
    def test_the_original_network_prints_98_79(self, monkeypatch, capsys, tmp_path):
        """The parameters that the original system saved after an epoch on plain digits."""
        out = tmp_path / "predictions.csv"
        flags = ("--split", "test", "--normalization", "none", "--out", out)
        assert run_here(monkeypatch, "--model", FLOAT32_NET, *flags) == 0
        assert "test: 98.79 % right, 9879 of 10000" in capsys.readouterr().out
        lines = out.read_text().splitlines()
        assert lines[:5] == ["Id,Prediction", "1,8", "2,3", "3,2", "4,1"]  # 7, 2, 1, 0
        assert len(lines) == 10_001 and lines[-1] == "10000,7"  # a six
        labels = data.load("test")[1]
        right = sum(
            int(line.split(",")[1]) == y + 1
            for line, y in zip(lines[1:], labels.tolist(), strict=True)
        )
        assert right == 9879


class TestScript:
    def test_a_net_in_a_process(self, monkeypatch, capsys, tmp_path, mnist):
        model, images, out = (tmp_path / name for name in ("any.name", "x.npy", "p.csv"))
        model.write_bytes(gzip.compress(save(pixels_net(), ascii=True)))
        np.save(images, bright([3, 0, 9]).numpy())
        flags = ("--model", model, "--images", images, "--out", out, "--normalization", "none")
        result = run(*flags, "--data", mnist)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{out} holds 3 predictions\n" and result.stderr == ""
        assert out.read_text() == "Id,Prediction\n1,4\n2,1\n3,10\n"
        images.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")  # a pickle
        monkeypatch.chdir(tmp_path)
        assert run_here(monkeypatch, *flags) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("predict.py: error: ") and captured.err.count("\n") == 1
        assert captured.out == "" and not (tmp_path / "executed").exists()
        assert out.read_text().startswith("Id")  # the old one is whole

    def test_digits_and_batches(self, monkeypatch, tmp_path, mnist):
        model, images, out = tmp_path / "m.net", tmp_path / "x.pt", tmp_path / "p.csv"
        model.write_bytes(save(pixels_net(np.float32)))
        torch.save(bright([3, 0, 9]), images)
        flags = (
            "--model",
            model,
            "--images",
            images,
            "--out",
            out,
            "--batch-size",
            2,
            "--data",
            mnist,
        )
        assert run_here(monkeypatch, *flags, "--labels", "digits", "--normalization", "none") == 0
        assert out.read_text() == "Id,Prediction\n1,3\n2,0\n3,9\n"

    def test_a_checkpoint_and_its_accuracy(self, monkeypatch, capsys, tmp_path, mnist):
        path, model = checkpoint(tmp_path / "run", mnist, "global", None)
        out = tmp_path / "p.csv"
        for split in ("test", "train"):
            flags = ("--model", path, "--split", split, "--data", mnist, "--out", out)
            assert run_here(monkeypatch, *flags, "--labels", "digits") == 0
            expected = expected_predictions(model, mnist, "global", split=split)
            rows = [f"{i},{digit}" for i, digit in enumerate(expected.tolist(), 1)]
            assert out.read_text().splitlines() == ["Id,Prediction", *rows]
            labels = data.load(split, mnist)[1]
            right = int((expected == labels).sum())
            share = f"{split}: {100 * right / len(labels):.2f} % right, {right} of {len(labels)}"
            assert share in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "run"]

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ((), "arguments are required: --model"),
            (("--model", "m"), "one of the arguments --images --split is required"),
            (("--model", "m", "--split", "test", "--images", "i"), "not allowed with argument"),
            (("--model", "m", "--split", "all"), "invalid choice: 'all'"),
            (("--model", "m", "--split", "test", "--batch-size", "0"), "must be 1 or more, got 0"),
            (("--model", "m", "--split", "test", "--device", "tpu0"), "--device tpu0 cannot be"),
            (
                ("--model", "m", "--split", "test", "--normalization", "contrastive8"),
                "--normalization must be 'none', 'contrastive' or 'contrastiveN' with N odd",
            ),
            (("--model", "m", "--split", "test"), "m cannot be read: No such file"),
        ],
    )
    def test_bad_flags(self, monkeypatch, capsys, tmp_path, flags, message):
        monkeypatch.chdir(tmp_path)
        assert run_here(monkeypatch, *flags) == 2
        captured = capsys.readouterr()
        assert message in captured.err and "Traceback" not in captured.err
        assert captured.out == "" and not list(tmp_path.iterdir())

    def test_the_output_is_written_whole_or_not_at_all(self, monkeypatch, capsys, tmp_path, mnist):
        model, images = tmp_path / "m.net", tmp_path / "x.npy"
        model.write_bytes(save(pixels_net()))
        np.save(images, bright([3]).numpy())
        flags = ("--model", model, "--images", images, "--data", mnist, "--out")
        assert run_here(monkeypatch, *flags, tmp_path / "no" / "p.csv") == 2
        assert "No such file" in capsys.readouterr().err
        (tmp_path / "folder").mkdir()
        assert run_here(monkeypatch, *flags, tmp_path / "folder") == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "m.net", "x.npy"]


EXECUTED = []


def execute(what):
    EXECUTED.append(what)


class Surprise:
    """Whoever unpickles it executes something."""

    def __reduce__(self):
        return (execute, ("this",))


@pytest.fixture(autouse=True)
def nothing_is_executed():
    EXECUTED.clear()
    yield
    assert not EXECUTED


def test_surprise():
    """Else the fixture could not notice anything."""
    pickle.loads(pickle.dumps(Surprise()))
    assert EXECUTED == ["this"]
    EXECUTED.clear()


class TestLoadModel:
    @pytest.mark.parametrize(
        ("normalization", "kernel", "recorded"),
        [
            ("global", None, "global"),
            ("none", None, "none"),
            ("contrastive", 7, "contrastive7"),
            ("contrastive", None, "contrastive"),
            ("contrastive", 15, "contrastive15"),
            (None, None, None),
        ],
    )
    def test_checkpoint(self, tmp_path, mnist, normalization, kernel, recorded):
        path, model = checkpoint(tmp_path, mnist, normalization, kernel)
        saved = prediction.load_model(path)
        assert saved.normalization == recorded and not saved.model.training
        for ours, theirs in zip(saved.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == torch.float64
        images, _ = data.load("test", mnist)
        if recorded is None:
            with pytest.raises(ValueError, match="does not record how its images were normalised"):
                prediction.predict(saved, images)
            return
        kind = "global" if prediction.kernel_of(recorded) is None else "contrastive"
        expected = expected_predictions(model, mnist, kind, kernel or 7)
        # The run's own mean and standard deviation, not those of the data at hand.
        assert torch.equal(prediction.predict(saved, images, root="/nowhere"), expected)

    def test_normalizations_differ(self, tmp_path, mnist):
        """Else the test above could not see which one was taken."""
        _, model = checkpoint(tmp_path, mnist)
        predictions = [
            expected_predictions(model, mnist, *options, split=split).tolist()
            for options in (("global",), ("contrastive", 7), ("contrastive", 15))
            for split in ("train", "test")
        ]
        assert len(set(map(str, predictions))) == 6

    def test_other_networks(self, tmp_path, mnist):
        network = {"widths": (4, 8, 16), "activation": ("relu", "tanh", "tanh"), "dropout": 0.5}
        network |= {"pooling": "max", "norm_kernel": None}
        path, model = checkpoint(tmp_path, mnist, "global", None, **network)
        saved = prediction.load_model(path)
        assert [type(m).__name__ for m in saved.model] == [
            type(m).__name__ for m in models.convnet(**network)
        ]
        images, _ = data.load("test", mnist)
        expected = expected_predictions(model, mnist, "global")
        assert torch.equal(prediction.predict(saved, images), expected)

    def test_torch7(self, monkeypatch, tmp_path, mnist):
        (tmp_path / "a").write_bytes(save(pixels_net()))
        saved = prediction.load_model(tmp_path / "a")
        assert saved.normalization == "contrastive" and saved.statistics is None
        # Without statistics of its own the data's serve; these pixels stand out under any.
        images = bright([7, 2]).unsqueeze(1)
        for normalization in ("none", None, "contrastive15"):
            assert prediction.predict(saved, images, normalization, mnist).tolist() == [7, 2]
        monkeypatch.setattr(data, "load", lambda *_: pytest.fail("the file has its own statistics"))
        own = replace(saved, statistics=(30.0, 70.0))
        assert prediction.predict(own, images).tolist() == [7, 2]

    def test_a_state_that_does_not_fit(self, tmp_path, mnist):
        path, _ = checkpoint(tmp_path, mnist, "global", None, widths=(4, 8, 16))
        state = training.load_checkpoint(path)
        for change, message in [
            ({"settings": {}}, "does not fit the network that its settings describe"),
            ({"settings": {"network": {"depth": 3}}}, "unexpected keyword argument 'depth'"),
            ({"settings": {"network": {"widths": (4,)}}}, "widths needs one convolution"),
            ({"settings": {"network": 3}}, "does not fit the network"),
            ({"model": {"conv1.weight": 1}}, "does not fit the network"),
            ({"model": {}}, "is a checkpoint without settings or network"),
            ({"settings": None}, "is a checkpoint without settings or network"),
        ]:
            training.save_checkpoint(path, state | change)
            with pytest.raises(training.CheckpointError, match=message) as caught:
                prediction.load_model(path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    def test_something_else(self, tmp_path):
        path = tmp_path / "model"
        buffer = io.BytesIO()
        torch.save({"format": 1, "x": Surprise()}, buffer)
        legacy = io.BytesIO()
        torch.save(Surprise(), legacy, _use_new_zipfile_serialization=False)
        for content, message in [
            (buffer.getvalue(), "is damaged or not a checkpoint"),
            (legacy.getvalue(), "is neither a checkpoint of mnist_ops nor a network of Torch7"),
            (b"", "is neither"),
            (b"\x89PNG\r\n\x1a\n", "is neither"),
            (b"PK\x03\x04", "is damaged or not a checkpoint"),
            (b"3\n1\n", "is truncated at byte 4"),
        ]:
            path.write_bytes(content)
            with pytest.raises((training.CheckpointError, ValueError), match=message):
                prediction.load_model(path)

    def test_a_network_for_other_images(self, tmp_path, mnist):
        path = tmp_path / "a.net"
        images = bright([1, 2]).unsqueeze(1)
        for layers, message in [
            ([Object("nn.Linear", weight=np.ones((10, 5)))], r"fails on images of 1x32x32: "),
            ([Object("nn.Tanh")], r"one row of scores per image, got shape \(2, 1, 32, 32\)"),
        ]:
            path.write_bytes(save(sequential(*layers)))
            with pytest.raises(ValueError, match=rf"a\.net: the network .*{message}"):
                prediction.predict(prediction.load_model(path), images, "none", mnist)
        with pytest.raises(ValueError, match="predict: batch_size must be >= 1, got 0"):
            prediction.predict(prediction.load_model(path), images, "none", batch_size=0)


class TestReadImages:
    def files(self, folder, images):
        raw = struct.pack(">4I", 2051, len(images), 28, 28) + images.numpy().tobytes()
        (folder / "idx").write_bytes(raw)
        (folder / "idx.gz").write_bytes(gzip.compress(raw))
        torch.save(images, folder / "a.pt")
        torch.save(images.unsqueeze(1), folder / "b")
        np.save(folder / "a.npy", images.numpy())
        np.save(folder / "fortran.npy", np.asfortranarray(images.unsqueeze(1).numpy()))
        return sorted(folder.iterdir())

    def test_every_format(self, tmp_path):
        images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
        paths = self.files(tmp_path, images)
        assert len(paths) == 6
        for path in paths:
            result = prediction.read_images(path)
            assert torch.equal(result, images.unsqueeze(1)) and result.is_contiguous()

    def test_shipped_files(self):
        path = data._shipped() / "t10k-images-idx3-ubyte.gz"
        assert torch.equal(prediction.read_images(path), data.load("test")[0])

    def test_truncated(self, tmp_path):
        images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
        for path in self.files(tmp_path, images):
            path.write_bytes(path.read_bytes()[:-900])
            with pytest.raises(data.DataError, match=f"{path.name}.* (truncated|damaged)"):
                prediction.read_images(path)

    def test_something_else(self, tmp_path):
        path = tmp_path / "images"

        def numpy_bytes(array, **options):
            np.save(buffer := io.BytesIO(), array, **options)
            return buffer.getvalue()

        def torch_bytes(value):
            torch.save(value, buffer := io.BytesIO())
            return buffer.getvalue()

        header = numpy_bytes(np.zeros((1, 28, 28), np.uint8))
        huge = header[:128].replace(b"(1, 28, 28), }", b"(9999999999, 28, 28), }")
        for content, message in [
            (b"", "is truncated: 0 bytes"),
            (b"\x89PNG\r\n\x1a\n" * 9, "is not an idx file of images"),
            (struct.pack(">4I", 2051, 1, 32, 32), "expected images of 28x28 pixels"),
            (struct.pack(">4I", 2051, 0, 28, 28), "holds no entries"),
            (numpy_bytes(np.zeros((3, 28, 28))), "must hold uint8 images of shape"),
            (numpy_bytes(np.zeros((3, 32, 32), np.uint8)), r"got torch.uint8 of shape \(3, 32"),
            (numpy_bytes(np.zeros((0, 28, 28), np.uint8)), "holds no images"),
            (numpy_bytes(np.array(["x"])), "is damaged or does not hold an array"),
            (numpy_bytes(np.array([Surprise()]), allow_pickle=True), "is damaged or does not"),
            (huge[:128], "is damaged or does not hold an array"),
            (torch_bytes(Surprise()), "is damaged or does not hold an array"),
            (torch_bytes({"x": 1}), "must hold one tensor, got dict"),
            (torch_bytes(torch.zeros(2, 28, 28)), "must hold uint8 images of shape"),
            (torch_bytes(torch.zeros(784, dtype=torch.uint8)), r"of shape \(784,\)"),
        ]:
            path.write_bytes(content)
            with pytest.raises(data.DataError, match=message) as caught:
                prediction.read_images(path)
            assert str(path) in str(caught.value)
        with pytest.raises(data.DataError, match="nothing cannot be read: No such file"):
            prediction.read_images(tmp_path / "nothing")
        with pytest.raises(data.DataError, match="cannot be read: Is a directory"):
            prediction.read_images(tmp_path)


def test_kernel_of():
    taps = {"none": None, "global": None, "contrastive": 7, "contrastive7": 7, "contrastive15": 15}
    for name, expected in taps.items():
        assert prediction.kernel_of(name) == expected
    for name in (
        "",
        "Contrastive",
        "contrastive0",
        "contrastive8",
        "contrastive-7",
        "contrastive 7",
    ):
        with pytest.raises(ValueError, match=f"with N odd, got '{name}'"):
            prediction.kernel_of(name)


def test_write_predictions(tmp_path):
    path = tmp_path / "p.csv"
    prediction.write_predictions(path, torch.tensor([9, 0]))
    assert path.read_bytes() == b"Id,Prediction\n1,10\n2,1\n"
    prediction.write_predictions(path, torch.tensor([9]), "digits")
    assert path.read_bytes() == b"Id,Prediction\n1,9\n"
    with pytest.raises(ValueError, match="labels must be 'classes' or 'digits', got 'x'"):
        prediction.write_predictions(path, torch.tensor([9]), "x")
