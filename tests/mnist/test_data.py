"""The shipped MNIST files, folders of the user's own, damaged files, and the preprocessing."""

import gzip
import hashlib
import math
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import REFERENCE

from mnist_ops import _unpack
from mnist_ops.mnist import data

NAMES = [file.name for file in data.FILES]
MEAN, STD = 25.509416422526041, 70.180423838272731  # of the original system


@pytest.fixture(scope="module")
def original():
    with np.load(REFERENCE / "online_original.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A copy of the shipped files that a test may damage."""
    for name in NAMES:
        shutil.copy(data._shipped() / f"{name}.gz", tmp_path)
    monkeypatch.setattr(data, "_shipped", lambda: tmp_path)
    return tmp_path


def idx_files(train=30, test=20, seed=0):
    """A tiny data set: the bytes of the four files."""
    rng = np.random.default_rng(seed)
    result = {}
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = rng.integers(0, 256, count * 784, dtype=np.uint8).tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        result[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4I", 2051, count, 28, 28) + pixels
        result[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2I", 2049, count) + labels
    return result


def write(folder, files, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


class TestShipped:
    def test_published_md5(self):
        published = {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        }
        for name, md5 in published.items():
            content = (data._shipped() / name).read_bytes()
            assert hashlib.md5(content).hexdigest() == md5
        assert {f"{file.name}.gz": file.gz_md5 for file in data.FILES} == published

    def test_licence_lies_beside(self):
        text = (data._shipped() / "LICENSE").read_text()
        assert "LeCun" in text and "CC BY-SA 3.0" in text

    @pytest.mark.parametrize(
        ("split", "count", "first", "per_class"),
        [
            (
                "train",
                60_000,
                [5, 0, 4, 1, 9],
                [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            ),
            (
                "test",
                10_000,
                [7, 2, 1, 0, 4],
                [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
            ),
        ],
    )
    def test_load(self, split, count, first, per_class):
        images, labels = data.load(split)
        assert images.shape == (count, 1, 28, 28) and images.dtype == torch.uint8
        assert labels.shape == (count,) and labels.dtype == torch.int64
        assert labels[:5].tolist() == first
        assert labels.bincount().tolist() == per_class

    def test_missing(self, shipped):
        (shipped / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(
            data.DataError, match=r"t10k-labels-idx1-ubyte.gz cannot be read: No such file.*Reinst"
        ):
            data.load("test")

    def test_altered(self, shipped):
        path = shipped / "train-labels-idx1-ubyte.gz"
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
        pattern = "train-labels.*altered: expected MD5 d53e105ee54ea40749a09fcbcd1e9432, got"
        with pytest.raises(data.DataError, match=pattern):
            data.load("train")


class TestOwnFolder:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("layout", ["", "MNIST/raw", "raw"])
    def test_layouts(self, tmp_path, layout, packed):
        files = idx_files()
        write(tmp_path / layout, files, packed)
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images, labels = data.load(split, tmp_path)
            assert images.numpy().tobytes() == files[f"{prefix}-images-idx3-ubyte"][16:]
            assert labels.tolist() == list(files[f"{prefix}-labels-idx1-ubyte"][8:])
        assert len(list((tmp_path / layout).iterdir())) == 4  # nothing was written there

    @pytest.mark.parametrize("layout", ["", "FashionMNIST/raw", "KMNIST/raw"])
    def test_other_names_and_sets(self, tmp_path, layout):
        files = idx_files()
        write(tmp_path / layout, {n.replace("-idx", ".idx"): c for n, c in files.items()})
        for folder in (tmp_path, tmp_path / layout):
            images, _ = data.load("train", folder)
            assert images.numpy().tobytes() == files["train-images-idx3-ubyte"][16:]
        where = f"files that are not MNIST's, in {tmp_path / layout}"
        assert data.describe(tmp_path) == where.rstrip("/")

    @pytest.mark.parametrize("kind", ["mnist", "digits"])
    def test_emnist(self, tmp_path, kind):
        """Its images are columns of pixels."""
        files = idx_files()
        names = {n: f"emnist-{kind}-{n.replace('t10k', 'test')}" for n in files}
        write(tmp_path / "EMNIST" / "raw", {names[n]: c for n, c in files.items()}, packed=True)
        for root in (tmp_path, tmp_path / "EMNIST"):
            for split, prefix in (("train", "train"), ("test", "t10k")):
                images, labels = data.load(split, root)
                pixels = np.frombuffer(files[f"{prefix}-images-idx3-ubyte"][16:], np.uint8)
                sideways = pixels.reshape(-1, 1, 28, 28).transpose(0, 1, 3, 2)
                assert np.array_equal(images.numpy(), sideways)
                assert labels.tolist() == list(files[f"{prefix}-labels-idx1-ubyte"][8:])

    def test_which_of_several_sets(self, tmp_path):
        for seed, name in enumerate(("FashionMNIST", "EMNIST", "MNIST")):
            write(tmp_path / name / "raw", idx_files(seed=seed))
            if name == "EMNIST":
                with pytest.raises(data.DataError, match="holds FashionMNIST and EMNIST: name"):
                    data.load("train", tmp_path)
        mnist = idx_files(seed=2)["train-images-idx3-ubyte"]
        assert data.load("train", tmp_path)[0].numpy().tobytes() == mnist[16:]
        stray = tmp_path / "train-labels-idx1-ubyte"
        stray.write_bytes(b"of nothing")  # a whole set comes before one file
        assert data.load("train", tmp_path)[0].numpy().tobytes() == mnist[16:]
        stray.unlink()
        (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").unlink()
        with pytest.raises(data.DataError, match="train-labels-idx1-ubyte is missing"):
            data.load("train", tmp_path)  # the labels of another set would not do

    def test_names_that_do_not_say_what_is_packed(self, tmp_path):
        files = idx_files()
        write(tmp_path, {n: gzip.compress(c) for n, c in list(files.items())[:2]})
        write(tmp_path, {f"{n}.gz": c for n, c in list(files.items())[2:]})
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images, _ = data.load(split, tmp_path)
            assert images.numpy().tobytes() == files[f"{prefix}-images-idx3-ubyte"][16:]

    def test_mnist_is_what_has_its_bytes(self, tmp_path):
        assert data.describe() == data.describe(data._shipped()) == "MNIST"
        for name in NAMES:
            content = gzip.decompress((data._shipped() / f"{name}.gz").read_bytes())
            (tmp_path / name).write_bytes(content)
        assert data.describe(tmp_path) == "MNIST"
        with open(tmp_path / NAMES[3], "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        assert data.describe(tmp_path) == f"files that are not MNIST's, in {tmp_path}"

    def test_mixed(self, tmp_path):
        files = idx_files()
        write(tmp_path, dict(list(files.items())[:2]))
        write(tmp_path, dict(list(files.items())[2:]), packed=True)
        assert len(data.load("test", str(tmp_path))[0]) == 20

    def test_official_files(self):
        assert torch.equal(data.load("test", data._shipped())[0], data.load("test")[0])

    def test_no_folder(self, tmp_path):
        with pytest.raises(data.DataError, match="nowhere is not a folder"):
            data.load("train", tmp_path / "nowhere")

    @pytest.mark.parametrize("name", NAMES)
    def test_missing(self, tmp_path, name):
        files = idx_files()
        del files[name]
        write(tmp_path, files)
        with pytest.raises(
            data.DataError, match=f"^{name} is missing: .* neither it nor {name}.gz"
        ):
            data.load("train", tmp_path)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("name", NAMES[:2])
    @pytest.mark.parametrize("keep", [0, 3, 10, 25])
    def test_truncated(self, tmp_path, name, packed, keep):
        write(tmp_path, idx_files(), packed)
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(data.DataError, match=f"{path.name} is (truncated|damaged)"):
            data.load("train", tmp_path)

    def test_altered_gz(self, tmp_path):
        write(tmp_path, idx_files(), packed=True)
        path = tmp_path / "train-images-idx3-ubyte.gz"
        content = bytearray(path.read_bytes())
        content[-8] ^= 1  # in the checksum
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte.gz is damaged"):
            data.load("train", tmp_path)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            (NAMES[0], lambda c: c + b"x", "is too long"),
            (NAMES[0], lambda c: struct.pack(">I", 2049) + c[4:], "expected magic number 2051"),
            (NAMES[1], lambda c: struct.pack(">I", 7) + c[4:], "expected magic number 2049, got 7"),
            (NAMES[0], lambda c: c[:8] + struct.pack(">2I", 56, 14) + c[16:], "got 56x14"),
            (NAMES[1], lambda c: c[:-1] + b"\x0a", "labels must be 0 to 9, got 10"),
            (NAMES[1], lambda _: struct.pack(">2I", 2049, 0), "holds no entries"),
            (NAMES[1], lambda _: struct.pack(">2I", 2049, 1) + b"\0", "do not match"),
            (NAMES[0], lambda c: c[:4] + struct.pack(">I", 2**32 - 1) + c[8:], "is truncated"),
        ],
    )
    def test_inconsistent(self, tmp_path, name, change, message):
        files = idx_files()
        files[name] = change(files[name])
        write(tmp_path, files)
        with pytest.raises(data.DataError, match=message) as caught:
            data.load("train", tmp_path)
        assert str(tmp_path) in str(caught.value)

    @pytest.mark.parametrize(
        "announced",
        ["too much", *(pytest.param(n, marks=pytest.mark.slow) for n in ("right", "little"))],
    )
    def test_bombs(self, tmp_path, announced):
        """gzip packs zeros a thousandfold: 400 kB of it are 392 MB."""
        counts = {"right": 500_000, "little": 10, "too much": 2_000_000}
        files = idx_files()
        count = counts[announced]
        files[NAMES[1]] = struct.pack(">2I", 2049, count) + bytes(count)
        write(tmp_path, files, packed=True)
        with gzip.open(tmp_path / f"{NAMES[0]}.gz", "wb") as file:
            file.write(struct.pack(">4I", 2051, count, 28, 28))
            for _ in range(392):
                file.write(bytes(1_000_000))
        assert (tmp_path / f"{NAMES[0]}.gz").stat().st_size < 500_000
        code = """
            import sys
            import torch
            from mnist_ops.mnist import data
            def peak():
                lines = open("/proc/self/status").read().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
            before = peak()
            try:
                print(len(data.load("train", sys.argv[1])[0]))
            except data.DataError as error:
                print(error)
            print((peak() - before) // 1000)
        """
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        said, megabytes = result.stdout.splitlines()
        message, limit = {
            "right": ("500000", 900),
            "little": ("is too long", 20),
            "too much": ("announces 1568000016 bytes, more than the 1073741824", 20),
        }[announced]
        assert message in said and int(megabytes) < limit, result

    def test_no_memory(self, tmp_path, monkeypatch):
        def read(*_):
            raise MemoryError

        write(tmp_path, idx_files(), packed=True)
        monkeypatch.setattr(_unpack, "read", read)
        with pytest.raises(data.DataError, match="needs more memory than there is"):
            data.load("train", tmp_path)

    def test_black_images(self, tmp_path):
        files = idx_files()
        files[NAMES[0]] = files[NAMES[0]][:16] + bytes(30 * 784)
        write(tmp_path, files)
        for normalization in ("global", "contrastive"):
            with pytest.raises(data.DataError, match=f"{tmp_path}: all pixels .* are 0"):
                data.prepare(normalization, root=tmp_path)

    def test_split(self, tmp_path):
        with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'validation'"):
            data.load("validation", tmp_path)


class TestPreprocessing:
    def test_pad32(self):
        images = torch.arange(2 * 784, dtype=torch.uint8).view(2, 1, 28, 28)
        padded = data.pad32(images)
        assert padded.shape == (2, 1, 32, 32) and padded.dtype == torch.uint8
        assert torch.equal(padded[:, :, 2:-2, 2:-2], images)
        assert padded.sum(dtype=torch.int64) == images.sum(dtype=torch.int64)

    def test_statistics_exactly(self):
        images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
        values = [Fraction(value) for value in data.pad32(images).flatten().tolist()]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        assert data.global_statistics(images) == pytest.approx(
            (float(mean), math.sqrt(variance)), rel=1e-15
        )

    def test_statistics_of_the_training_set(self):
        images, _ = data.load("train")
        mean, std = data.global_statistics(images)
        assert mean == pytest.approx(MEAN, rel=1e-15)
        # Torch7 added 61 million squares one by one: its last digits are rounding, and come out
        # the same when that is done here.
        total = 0.0
        for piece in data.pad32(images).split(6000):
            squares = (piece.numpy().astype(np.float64).reshape(-1) - MEAN) ** 2
            squares[0] += total
            total = np.add.accumulate(squares)[-1]
        assert math.sqrt(total / (60_000 * 1024 - 1)) == pytest.approx(STD, rel=1e-12)
        assert std == pytest.approx(STD, rel=1e-9)
        assert np.float32(std) == np.float32(STD)  # what the pixels are divided by

    def test_statistics_want_bytes(self):
        with pytest.raises(TypeError, match=r"images must be uint8, got torch.float32"):
            data.global_statistics(torch.zeros(1, 1, 28, 28))

    @pytest.mark.parametrize("value", [0, 7, 255])
    def test_statistics_of_equal_pixels(self, value):
        images = torch.full((3, 1, 28, 28), value, dtype=torch.uint8)
        with pytest.raises(ValueError, match="differ in some pixel, got a standard deviation of 0"):
            data.global_statistics(images, padding=0)
        if value:
            assert data.global_statistics(images)[1] > 0  # they differ from the padding

    def test_statistics_of_nothing(self):
        for shape in ((0, 1, 28, 28), (2, 1, 0, 4)):
            with pytest.raises(ValueError, match="images must hold one pixel at least"):
                data.global_statistics(torch.zeros(shape, dtype=torch.uint8))
        with pytest.raises(ValueError, match="padding must be >= 0, got -1"):
            data.global_statistics(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), -1)

    @pytest.mark.parametrize(
        ("mean", "std", "message"),
        [
            (math.nan, 1.0, "mean must be finite in float32, got nan"),
            (math.inf, 1.0, "mean must be finite in float32, got inf"),
            (1e39, 1.0, "mean must be finite in float32, got 1e"),
            (0.0, 0.0, "std must be finite and > 0 in float32, got 0.0"),
            (0.0, 1e-46, "std must be finite and > 0 in float32, got 1e-46"),
            (0.0, -1.0, "std must be finite and > 0 in float32, got -1.0"),
            (0.0, math.nan, "std must be finite and > 0 in float32, got nan"),
            (0.0, 10**400, "std is too large for a float"),
        ],
    )
    def test_statistics_that_cannot_be(self, mean, std, message):
        with pytest.raises(ValueError, match=f"global_norm: {message}"):
            data.global_norm(torch.zeros(1, 1, 2, 2), mean, std)

    def test_global(self):
        splits = data.prepare("global", limit=100)
        images, labels = data.load("train")
        assert splits.train_images.shape == splits.test_images.shape == (100, 1, 32, 32)
        assert splits.train_images.dtype == torch.float32
        assert torch.equal(splits.train_labels, labels[:100])
        expected = (data.pad32(images[:100]).double() - MEAN) / STD
        torch.testing.assert_close(splits.train_images.double(), expected, rtol=1e-6, atol=1e-6)
        assert splits.train_images.min().item() == pytest.approx(-0.3635, abs=5e-5)

    def test_local_is_the_originals_to_the_bit(self, original):
        splits = data.prepare(limit=3)
        for split, images in (("train", splits.train_images), ("test", splits.test_images)):
            expected = torch.from_numpy(original[f"{split}_first3"])
            assert torch.equal(images.double(), expected), (images.double() - expected).abs().max()

    def test_local_statistics(self):
        splits = data.prepare()
        assert splits.train_images.shape == (60_000, 1, 32, 32)
        assert splits.test_images.shape == (10_000, 1, 32, 32)
        assert splits.train_images.mean(dtype=torch.float64).item() == pytest.approx(
            -0.01198911, abs=2e-8
        )
        assert splits.train_images.double().std().item() == pytest.approx(0.48330709, abs=2e-8)

    def test_statistics_are_the_training_sets(self, tmp_path):
        files = idx_files()
        write(tmp_path, files)
        splits = data.prepare("global", root=tmp_path, limit=5)
        train = np.frombuffer(files[NAMES[0]][16:], np.uint8).reshape(30, 28, 28)
        padded = np.pad(train, ((0, 0), (2, 2), (2, 2))).astype(np.float64)
        assert splits.mean == pytest.approx(padded.mean(), rel=1e-14)
        assert splits.std == pytest.approx(padded.std(ddof=1), rel=1e-14)
        test = np.frombuffer(files[NAMES[2]][16:], np.uint8).reshape(20, 28, 28)[:5]
        expected = (np.pad(test, ((0, 0), (2, 2), (2, 2))) - splits.mean) / splits.std
        np.testing.assert_allclose(splits.test_images[:, 0], expected, rtol=1e-5, atol=1e-6)

    def test_other_kernel_size(self):
        seven = data.prepare(limit=2).train_images
        fifteen = data.prepare(kernel_size=15, limit=2).train_images
        assert fifteen.shape == seven.shape and not torch.allclose(fifteen, seven, atol=1e-2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"normalization": "none"}, "normalization must be 'contrastive' or 'global'"),
            ({"limit": 0}, "limit must be >= 1, got 0"),
            ({"limit": 10**30}, r"limit must fit 64 bits"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            data.prepare(**options)
