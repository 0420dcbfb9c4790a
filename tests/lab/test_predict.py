"""The result script as users run it, and what it is made of: models, images, files of all kinds."""

import gzip
import io
import lzma
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from torch7_writer import Object, long_storage, save, sequential

from mnist_ops import torch7, training
from mnist_ops.lab import predict_command, prediction
from mnist_ops.mnist import data, models
from mnist_ops.torch7 import optim

ROOT = Path(__file__).parents[2]
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
    try:
        return predict_command.main()
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
        optimizer=optim.SGD(model.parameters()),
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
            (("--model", "m", "--split", "test", "--device", "tpu0"), "--device: tpu0 cannot be"),
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
        flags = ("--model", model, "--normalization", "none", "--images", images, "--data", mnist)
        flags += ("--out",)
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
        assert saved.normalization is None and saved.statistics is None
        # Without statistics of its own the data's serve; these pixels stand out under any.
        images = bright([7, 2]).unsqueeze(1)
        for normalization in ("none", "contrastive", "contrastive15"):
            assert prediction.predict(saved, images, normalization, mnist).tolist() == [7, 2]
        monkeypatch.setattr(data, "load", lambda *_: pytest.fail("the file has its own statistics"))
        own = replace(saved, statistics=(30.0, 70.0))
        assert prediction.predict(own, images, "contrastive").tolist() == [7, 2]
        with pytest.raises(
            ValueError, match=r"a does not record .* 'none' .* 'contrastive' .* 'con"
        ):
            prediction.predict(saved, images, root=mnist)

    def test_a_state_that_does_not_fit(self, tmp_path, mnist):
        path, _ = checkpoint(tmp_path, mnist, "global", None, widths=(4, 8, 16))
        state = training.load_checkpoint(path)
        for change, message in [
            ({"settings": {}}, "does not fit the network that its settings describe"),
            ({"settings": {"network": {"depth": 3}}}, "unexpected keyword argument 'depth'"),
            ({"settings": {"network": {"widths": (4,)}}}, "widths needs one convolution"),
            ({"settings": {"network": 3}}, "network must be a dict, got int"),
            ({"settings": {"network": {"widths": 3}}}, "does not fit the network"),
            (
                {"settings": {"network": {"norm_kernel": 10**9}}},
                "at most 10,000, got 1,000,000,000",
            ),
            ({"settings": {"network": {"widths": [10**9] * 3}}}, "at most 10,000, got 1,000,"),
            ({"settings": {"network": {"widths": [9999] * 3}}}, "conv1.weight must have shape"),
            ({"settings": {"network": {"widths": [4] * 10**6}}}, "has 1,000,000 entries"),
            ({"settings": {"network": {"image_size": 9999}}}, "must have shape"),
            ({"model": {"conv1.weight": 1}}, "is a checkpoint without settings or network"),
            (
                {"model": {name: w.long() for name, w in state["model"].items()}},
                "conv1.weight must have shape .* got torch.int64",
            ),
            ({"model": {}}, "is a checkpoint without settings or network"),
            ({"settings": None}, "is not a checkpoint: it holds no settings"),
        ]:
            training.write_torch(path, state | change)
            with pytest.raises(training.CheckpointError, match=message) as caught:
                prediction.load_model(path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    def test_numbers_that_cannot_be_used(self, tmp_path, mnist):
        path, _ = checkpoint(tmp_path, mnist, "global", None, widths=(4, 8, 16))
        state = training.load_checkpoint(path)
        settings = state["settings"]
        weights = {name: w.clone() for name, w in state["model"].items()}
        weights["linear1.bias"][3] = float("nan")
        for change, message in [
            ({"model": weights}, "the network's linear1.bias holds NaN or infinite numbers"),
            ({"settings": settings | {"std": 0.0}}, "and standard deviation 0.0: no image can be"),
            ({"settings": settings | {"std": float("nan")}}, "standard deviation nan: no image"),
            ({"settings": settings | {"mean": float("inf")}}, "of mean inf and standard deviation"),
            ({"settings": settings | {"std": "7"}}, "standard deviation nan: no image"),
            ({"settings": settings | {"normalization": "local"}}, "normalization must be 'none'"),
            ({"settings": settings | {"normalization": "contrastive", "data_kernel": 8}}, "N odd"),
        ]:
            training.write_torch(path, state | change)
            with pytest.raises(training.CheckpointError, match=message) as caught:
                prediction.load_model(path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        (tmp_path / "a.net").write_bytes(
            save(sequential(Object("nn.Linear", weight=np.array([[1, np.inf]]))))
        )
        with pytest.raises(ValueError, match=r"a\.net: the network's 0\.weight holds NaN or inf"):
            prediction.load_model(tmp_path / "a.net")

    def test_scores_that_are_not_numbers(self, tmp_path, mnist):
        """Weights may be finite and the scores not."""
        weight = np.full((10, 1024), 1e200)
        layers = [Object("nn.Reshape", size=long_storage(1024)), Object("nn.Square")]
        layers += [Object("nn.Linear", weight=weight), Object("nn.Square"), Object("nn.LogSoftMax")]
        (tmp_path / "a.net").write_bytes(save(sequential(*layers)))
        saved = prediction.load_model(tmp_path / "a.net")
        with pytest.raises(ValueError, match="the network's scores are NaN for 2 of 2 images"):
            prediction.predict(saved, bright([1, 2]).unsqueeze(1), "none", mnist)

    def test_a_single_flipped_bit(self, tmp_path, mnist):
        path, _ = checkpoint(tmp_path, mnist, "global", None, widths=(4, 8, 16))
        whole = path.read_bytes()
        weights = torch.load(path, weights_only=True)["model"]["linear1.weight"]
        place = whole.index(weights.numpy().tobytes()) + 100
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(training.CheckpointError, match=r"checkpoint\.pt is damaged"):
            prediction.load_model(path)

    def test_model_pt(self, tmp_path, mnist):
        """A state_dict, as the scripts leave it beside the checkpoint."""
        network = {"widths": (4, 8, 16), "activation": "relu"}
        path, model = checkpoint(tmp_path, mnist, "contrastive", 15, **network)
        with torch.no_grad():
            next(model.parameters()).mul_(2)  # it is the file's own weights that count
        training.write_torch(tmp_path / "model.pt", model.state_dict())
        saved = prediction.load_model(tmp_path / "model.pt")
        assert saved.normalization == "contrastive15"
        assert saved.statistics == prediction.load_model(path).statistics is not None
        images, _ = data.load("test", mnist)
        expected = expected_predictions(model, mnist, "contrastive", 15)
        assert torch.equal(prediction.predict(saved, images), expected)
        path.unlink()  # now nothing tells
        with pytest.raises(training.CheckpointError, match="does not fit the network"):
            prediction.load_model(tmp_path / "model.pt")
        original = models.convnet(dtype=torch.float32)
        training.write_torch(tmp_path / "model.pt", original.state_dict())
        saved = prediction.load_model(tmp_path / "model.pt")
        assert saved.normalization is saved.statistics is None
        with pytest.raises(
            ValueError, match="does not record how its images were normalised; name"
        ):
            prediction.predict(saved, images, root=mnist)
        expected = expected_predictions(original.double().eval(), mnist, "global")
        agree = prediction.predict(saved, images, "none", mnist) == expected
        assert agree.sum() > 20

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
        (folder / "idx.gz").write_bytes(gzip.compress(raw[:99]) + gzip.compress(raw[99:]))
        (folder / "idx.xz").write_bytes(lzma.compress(raw))
        torch.save(images, folder / "a.pt")
        torch.save(images.unsqueeze(1), folder / "b")
        np.save(folder / "a.npy", images.numpy())
        np.save(folder / "fortran.npy", np.asfortranarray(images.unsqueeze(1).numpy()))
        return sorted(folder.iterdir())

    def test_every_format(self, tmp_path):
        images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
        paths = self.files(tmp_path, images)
        assert len(paths) == 7
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


BOMBS = """
import sys, torch
from mnist_ops.mnist import models
from mnist_ops.lab import prediction
from mnist_ops import torch7
from mnist_ops.torch7 import files as torch7_files
from mnist_ops import training
def memory(name):
    line = next(each for each in open("/proc/self/status") if each.startswith(name))
    return int(line.split()[1]) >> 10
torch.zeros(3).isfinite().all()
models.convnet()(torch.zeros(1, 1, 32, 32))
before = memory("VmRSS")
for line in sys.stdin.read().splitlines():
    reader, path = line.split(" ", 1)
    read = getattr(torch7 if reader == "load_net" else prediction, reader)
    try:
        read(path)
        print("read", path)
    except (torch7_files.Torch7FileError, prediction.data.DataError, training.CheckpointError) as e:
        print(f"{type(e).__name__}: {e}, with {memory('VmHWM') - before} MiB more")
"""


class TestBombs:
    """Little files that ask for much memory: refused before it is used."""

    @staticmethod
    def refused(files):
        """Readers and paths, and what each error says; in one process, as its start is slow."""
        lines = "".join(f"{reader} {path}\n" for reader, path, _ in files)
        command = [sys.executable, "-c", BOMBS]
        result = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        outcomes = result.stdout.splitlines()
        for (reader, path, message), outcome in zip(files, outcomes, strict=True):
            kind = {"read_images": "DataError", "load_net": "Torch7FileError"}.get(reader, "")
            assert "Error: " in outcome and outcome.startswith(kind), (reader, path, outcome)
            assert message in outcome, outcome
            # The most that any of the files before this one took, too.
            assert int(outcome.split()[-3]) < 130, outcome

    def test_packed_files_and_files_without_end(self, tmp_path):
        files = []
        count = 2**28 // 784
        images = struct.pack(">4I", 2051, count, 28, 28) + bytes(count * 784)
        text = struct.pack("<ii", 2, 2**28) + bytes(2**28)
        for pack in (gzip, lzma):
            for name, content in (("images", images), ("text", text)):
                path = tmp_path / f"{name}.{pack.__name__}"
                with pack.open(path, "wb", **({"preset": 0} if pack is lzma else {})) as file:
                    file.write(content)
                assert path.stat().st_size < 2**20
                if name == "images":
                    files.append(("read_images", path, "more than the"))
                else:
                    files += [(reader, path, "larger") for reader in ("load_model", "load_net")]
        heads = (b"", b"\x93NUMPY", b"PK\x03\x04", struct.pack(">4I", 2051, 9, 28, 28), b"\x03")
        for i, head in enumerate(heads):
            path = tmp_path / f"sparse{i}"
            with open(path, "wb") as file:
                file.write(head)
                file.truncate(2**40)
            files += [(reader, path, "") for reader in ("read_images", "load_model", "load_net")]
        self.refused(files)

    def test_archives(self, tmp_path, mnist):
        expanded = tmp_path / "expanded.pt"
        torch.save(torch.zeros(1, 28, 28, dtype=torch.uint8).expand(10**6, 28, 28), expanded)
        weights = tmp_path / "weights.pt"
        torch.save({"model": {"conv1.weight": torch.zeros(1).expand(10**9)}, "format": 1}, weights)
        assert expanded.stat().st_size < 5000 and weights.stat().st_size < 5000
        torch.save(torch.zeros(3 * 10**5, 28, 28, dtype=torch.uint8), stored := io.BytesIO())
        packed = tmp_path / "packed.pt"
        deflate = zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(stored) as old, zipfile.ZipFile(packed, "w", deflate) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        assert packed.stat().st_size < 2**20
        files = [("read_images", expanded, "damaged"), ("load_model", weights, "damaged")]
        files += [("read_images", packed, "damaged"), ("load_model", packed, "damaged")]
        path, _ = checkpoint(tmp_path, mnist, "global", None, widths=(4, 8, 16))
        state = training.load_checkpoint(path)
        for i, network in enumerate(
            [
                {"norm_kernel": 10**9},
                {"widths": (9999, 9999, 9999)},
                {"widths": (4, 8, 16), "image_size": 9999},
            ]
        ):
            path = tmp_path / f"settings{i}.pt"
            training.write_torch(path, state | {"settings": {"network": network}})
            files.append(("load_model", path, "does not fit the network"))
        self.refused(files)


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
    os.mkfifo(tmp_path / "pipe")  # as a device it must not be replaced by a file
    for special in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            prediction.write_predictions(special, torch.tensor([9]))
    assert (tmp_path / "pipe").is_fifo()
