"""Files of Torch7: both formats, every layer against Torch7's own outputs, damage of every kind."""

import gzip
import io
import lzma
import math
import os
import random
import resource
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE, torch7_cases, torch7_tensor
from loops import contrastive_norm2d, log_softmax, window_count
from torch7_writer import (
    Object,
    Storage,
    Table,
    Tds,
    TensorOf,
    convolution,
    cuda,
    long_storage,
    lp_pooling,
    pooling,
    save,
    sequential,
    versioned,
)

from mnist_ops import nn as ops_nn
from mnist_ops import torch7, training
from mnist_ops.mnist import data, models
from mnist_ops.torch7 import files as torch7_files
from mnist_ops.torch7 import load_net
from mnist_ops.torch7 import network as torch7_network
from mnist_ops.torch7.files import TableKey, Torch7FileError, Torch7Object, load

FLOAT32_NET = REFERENCE / "torch7" / "model_nonorm_epoch1.float32.net.xz"
ORIGINAL_NET = os.environ.get("MNIST_OPS_TORCH7_NET")


def read(content, **options):
    return load(io.BytesIO(content), **options)


def net(*modules, ascii=False, **options):
    return load_net(io.BytesIO(save(sequential(*modules), ascii)), **options)


def small_net(ascii=False, **machine):
    """A network with a layer of nearly every kind, some 3 kB."""
    rng = np.random.default_rng(0)
    storage = Storage(rng.standard_normal(2 * 9 + 2).round(3))
    return save(
        sequential(
            convolution(
                TensorOf(storage, (2, 9)), TensorOf(storage, (2,), offset=19), 1, 3, padding=1
            ),
            Object("nn.Tanh", output=rng.standard_normal(2).round(3)),
            lp_pooling(2, 2, 2),
            Object("nn.SpatialSubtractiveNormalization", kernel=np.array([1, 2, 1.0])),
            pooling("SpatialMaxPooling", 2, 2, ceil_mode=False),
            Object("nn.Reshape", size=long_storage(8), nelement=8),
            sequential(
                Object("nn.Linear", weight=rng.standard_normal((3, 8)).round(3), bias=np.ones(3)),
                Object("nn.ReLU", threshold=0, val=0, inplace=False),
                Object("nn.Dropout", p=0.5, v2=True, train=True),
            ),
            Object("nn.LogSoftMax"),
        ),
        ascii,
        **machine,
    )


class TestFormat:
    def test_the_originals_own_bytes(self):
        """A layer cut out of the file that the original system saved."""
        layer = load(REFERENCE / "torch7" / "logsoftmax.net")
        assert isinstance(layer, Torch7Object) and layer.class_name == "nn.LogSoftMax"
        assert set(layer.fields) == {"output", "gradInput", "train"}
        output = layer.fields["output"]
        assert output.shape == (10,) and output.dtype == torch.float64
        assert layer.fields["train"] is True
        # Of the last training sample, a nine: exp(output) less 1 at its class is the gradient, and
        # its sum differs from 1 by the approximate exponential's error.
        expected = output.exp() - F.one_hot(torch.tensor(9), 10)
        torch.testing.assert_close(layer.fields["gradInput"], expected, rtol=1e-12, atol=0)
        assert 0 < abs(float(output.exp().sum()) - 1.0) < 2e-4

    def test_bytes_written_by_hand(self):
        name = struct.pack("<i", 4) + b"name"
        content = struct.pack("<iii", 3, 1, 2)  # a table, number 1, two entries
        content += struct.pack("<i", 2) + name + struct.pack("<id", 1, 0.5)
        content += struct.pack("<id", 1, 1.0) + struct.pack("<ii", 5, 1)
        assert read(content) == {"name": 0.5, 1: True}
        text = b"3\n1\n2\n2\n4\nname\n1\n0.5\n1\n1\n5\n1\n"
        assert read(text) == {"name": 0.5, 1: True}
        tensor = struct.pack("<iii", 4, 1, 3) + b"V 1" + struct.pack("<i", 17)
        tensor += b"torch.FloatTensor" + struct.pack("<iqqqqq", 2, 2, 2, 1, 2, 2)
        tensor += struct.pack("<iii", 4, 2, 3) + b"V 1" + struct.pack("<i", 18)
        tensor += b"torch.FloatStorage" + struct.pack("<q5f", 5, 0, 1, 2, 3, 4)
        assert read(tensor).tolist() == [[1, 3], [2, 4]]  # transposed, from the second number on
        early = tensor.replace(struct.pack("<i", 3) + b"V 1", b"")  # without versions
        assert read(early).tolist() == [[1, 3], [2, 4]]

    @pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])
    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            False,
            3,
            -0.1,
            2.0**60,
            float("inf"),
            "",
            "with spaces\nand 2\nlines",
            "\udcff\udc80 no UTF-8 é",
            [1, "two", [3.5, None]],
            {},
            {"a": {"b": [True]}, 1: 2, 3: 4, -1.5: "x"},
            {1: "no list", 3: "gap"},
            {True: 1, "x": False},
        ],
        ids=repr,
    )
    def test_values(self, value, ascii):
        result = read(save(value, ascii))
        assert result == value and type(result) is (float if value == 2.0**60 else type(value))
        if isinstance(value, dict):
            assert [type(key) for key in result] == [type(key) for key in value]

    @pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])
    @pytest.mark.parametrize(
        "dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8"]
    )
    def test_tensors(self, dtype, ascii):
        values = np.array([[0, 1, 10], [100, 32, 13]]).astype(dtype)
        if values.dtype.kind == "f":
            values[0] = [np.nan, -np.inf, np.float16(0.1)]
        elif dtype != "uint8":
            values[0, 0] = np.iinfo(dtype).min
        content = save({"whole": values, "storage": Storage(values), "empty": values[:0]}, ascii)
        result = read(content)
        np.testing.assert_array_equal(result["whole"].numpy(), values)
        assert result["whole"].numpy().dtype == values.dtype
        np.testing.assert_array_equal(result["storage"].numpy(), values.reshape(-1))
        assert result["empty"].shape == (0, 3)

    @pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])
    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [
            ("Cuda", "float32"),
            ("CudaDouble", "float64"),
            ("CudaHalf", "float16"),
            ("CudaLong", "int64"),
            ("CudaInt", "int32"),
            ("CudaShort", "int16"),
            ("CudaChar", "int8"),
            ("CudaByte", "uint8"),
        ],
    )
    def test_tensors_of_the_gpu(self, kind, dtype, ascii):
        values = np.array([[1, 2, 100], [3, 0, 7]], dtype=dtype)
        content = save([cuda(values, kind), Storage(values, kind)], ascii)
        assert f"torch.{kind}Tensor".encode() in content
        tensor, storage = read(content)
        np.testing.assert_array_equal(tensor.numpy(), values)
        assert tensor.numpy().dtype == storage.numpy().dtype == values.dtype

    @pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
    @pytest.mark.parametrize("long_size", [4, 8])
    def test_other_machines(self, order, long_size):
        """Longs of 32 bits (32-bit systems, Windows), and big-endian numbers."""
        storage = Storage(np.arange(12.0))
        value = {
            "half": np.array([1.5, -2], np.float16),
            "shorts": np.array([[-3, 4]], np.int16),
            "longs": np.array([7, -(2**31), 0], np.int64),
            "sizes": long_storage(-1, 5),
            "shared": [TensorOf(storage, (2, 3), offset=4), TensorOf(storage, (3, 2), (1, 3), 4)],
            "empty": np.zeros(0),
            "more": Tds("tds.Vec", "a", Tds("tds.Hash", ("k", 2.5))),
            -0.5: [True, None, "text"],
        }
        result = read(save(value, order=order, long_size=long_size))
        assert result["half"].tolist() == [1.5, -2] and result["half"].dtype == torch.float16
        assert result["shorts"].tolist() == [[-3, 4]]
        assert result["longs"].tolist() == [7, -(2**31), 0]
        assert result["longs"].dtype == result["sizes"].dtype == torch.int64
        assert result["sizes"].tolist() == [-1, 5]
        assert result["shared"][0].tolist() == [[3, 4, 5], [6, 7, 8]]
        result["shared"][0][0, 0] = 77
        assert result["shared"][1][0, 0] == 77
        assert result["empty"].numel() == 0 and result["more"] == ["a", {"k": 2.5}]
        assert result[-0.5] == {1: True, 2: None, 3: "text"} or result[-0.5] == [True, None, "text"]
        # Networks, too: the one of all files here, byte for byte the same numbers.
        x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        model = load_net(io.BytesIO(small_net(order=order, long_size=long_size)))
        assert torch.equal(model(x), load_net(io.BytesIO(small_net()))(x))

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_damage_of_other_machines_files_is_told_as_theirs(self, order):
        content = save({"x": np.arange(50.0)}, order=order, long_size=4)
        with pytest.raises(Torch7FileError, match=rf"is truncated at byte {len(content) - 1}: "):
            read(content[:-1])

    def test_tables_as_keys(self):
        """As nngraph's: tables, objects, tensors and truths as keys."""
        key, node = {"a": 1}, Object("nngraph.Node", id=3)
        listed = [1, 2]
        table = Table((key, "by table"), (node, "by object"), (listed, "by list"), (True, "true"))
        outer = {"table": table, "key": key, "node": node, "list": listed, "self": Table()}
        outer["tensor"] = Table((np.arange(2.0), 5))
        outer["self"].entries = ((outer["self"], 1),)
        result = read(save(outer))
        assert result["table"][TableKey(result["key"])] == "by table"
        assert result["table"][result["node"]] == "by object"
        assert result["table"][TableKey(result["list"])] == "by list"
        assert result["table"][True] == "true" and len(result["table"]) == 4
        (found,) = result["tensor"]
        assert found.tolist() == [0, 1] and result["tensor"][found] == 5
        assert result["self"][TableKey(result["self"])] == 1
        assert TableKey({}) != TableKey({}) and isinstance(repr(result["table"]), str)
        for first, second in ((1, True), (True, 1), (0, False)):
            with pytest.raises(
                Torch7FileError, match=r"not supported: a table with the keys \d and"
            ):
                read(save(Table((first, "a"), (second, "b"))))

    @pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])
    def test_tds(self, ascii):
        inner = Tds("tds.Vec", 1.5, None, "x")
        table = {"hash": Tds("tds.Hash", ("k", inner), (7, True)), "again": inner}
        table["empty"], table["counter"] = Tds("tds.Vec"), versioned(Tds("tds.AtomicCounter"), 0)
        result = read(save(table, ascii))
        assert result["hash"] == {"k": [1.5, None, "x"], 7: True}
        assert result["again"] is result["hash"]["k"] and result["empty"] == []
        assert result["counter"] == 0
        damaged = save(Tds("tds.Vec")).replace(struct.pack("<q", 0), struct.pack("<q", -1))
        with pytest.raises(Torch7FileError, match=r"a tds\.Vec's size is -1"):
            read(damaged)

    def test_versions(self):
        assert read(save(versioned(Object("nn.BatchNormalization"), 2))).version == 2
        early = save(Object("nn.Tanh")).replace(struct.pack("<i", 3) + b"V 1", b"")
        assert read(early).version == 0

    @pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])
    def test_what_is_shared_stays_shared(self, ascii):
        storage = Storage(np.arange(12.0))
        layer = Object("nn.Tanh")
        table = {"first": TensorOf(storage, (2, 3), offset=4), "layer": layer, "again": [layer]}
        table["columns"] = TensorOf(storage, (3, 2), (1, 3), 4)
        table["repeated"] = TensorOf(storage, (1000, 2), (0, 1), 11)
        table["itself"] = table
        result = read(save(table, ascii))
        assert result["first"].tolist() == [[3, 4, 5], [6, 7, 8]]
        assert torch.equal(result["columns"], result["first"].T)
        result["first"][0, 0] = 77
        assert result["columns"][0, 0] == 77
        assert result["repeated"].shape == (1000, 2)
        assert result["repeated"][999].tolist() == [10, 11]
        assert result["repeated"].untyped_storage().nbytes() == 12 * 8
        assert result["layer"] is result["again"][0] and result["itself"] is result

    def test_a_list_that_contains_itself(self):
        table = [1, 2]
        table.append(table)
        result = read(save(table))
        assert result[3] is result and result[1] == 1

    @pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress], ids=["", "gz", "xz"])
    def test_packed_or_not_whatever_the_name(self, pack, tmp_path):
        path = tmp_path / "model.anything"
        path.write_bytes(pack(save({"x": 1})))
        assert load(path) == load(str(path)) == {"x": 1}
        with open(path, "rb") as file:
            assert load(file) == {"x": 1}
        path.write_bytes(lzma.compress(save({"x": 1})[:5]) + lzma.compress(save({"x": 1})[5:]))
        assert load(path) == {"x": 1}

    def test_objects_print_themselves(self):
        assert repr(read(save(Object("nn.Tanh", train=True, p=1)))) == (
            "Torch7Object('nn.Tanh', fields train, p)"
        )


def module_case(name):
    return next(case for case in torch7_cases("modules") if case["name"] == name)


@pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])
class TestLayersAgainstTorch7:
    """Layers in a file, and what the original system computed with the same layers."""

    @staticmethod
    def check(module, case, ascii, tolerance=1e-12):
        image = torch7_tensor(case["input"])
        expected = torch7_tensor(case["output"])
        network = net(module, ascii=ascii)
        assert not network.training
        single = case.get("nInputPlane") is not None and image.dim() == 4
        single = single or (image.dim() in (2, 4) and "batch" in case["name"])
        result = network(image if single else image.unsqueeze(0))
        expected = expected if single else expected.unsqueeze(0)
        torch.testing.assert_close(result, expected, rtol=0, atol=tolerance, equal_nan=True)

    @pytest.mark.parametrize(
        ("name", "layer"),
        [
            ("tanh", Object("nn.Tanh")),
            ("relu", Object("nn.ReLU", threshold=0, val=0, inplace=False)),
            ("maxpool2", pooling("SpatialMaxPooling", 2, 2, ceil_mode=False)),
            ("logsoftmax_vec10", Object("nn.LogSoftMax")),
            ("logsoftmax_vec10_wide_range", Object("nn.LogSoftMax")),
            ("dropout05_eval", Object("nn.Dropout", p=0.5, v2=True, noise=np.zeros(4))),
        ],
    )
    def test_plain(self, name, layer, ascii):
        self.check(layer, module_case(name), ascii)

    @pytest.mark.parametrize("name", ["SpatialConvolutionMM", "SpatialConvolution"])
    def test_convolution(self, name, ascii):
        case = module_case("SpatialConvolutionMM_2to3_k5")
        weight, bias = (torch7_tensor(case[key]).numpy() for key in ("weight", "bias"))
        if name == "SpatialConvolution":
            weight = weight.reshape(3, 2, 5, 5)
        self.check(convolution(weight, bias, 2, 5, name=name), case, ascii)

    def test_linear(self, ascii):
        case = module_case("Linear_7to4")
        weight, bias = (torch7_tensor(case[key]).numpy() for key in ("weight", "bias"))
        self.check(Object("nn.Linear", weight=weight, bias=bias), case, ascii)

    # Of negative numbers odd powers are signed, and their roots NaN.
    @pytest.mark.parametrize("case", torch7_cases("lppooling"), ids=lambda case: case["name"])
    def test_lp_pooling(self, case, ascii):
        power, kernel, stride = (int(case["name"][i]) for i in (1, 4, 6))
        self.check(
            lp_pooling(power, kernel, stride),
            case,
            ascii,
            1e-5 if "float" in case["name"] else 1e-12,
        )

    @pytest.mark.parametrize(
        "case",
        [c for c in torch7_cases("normalization") if "Contrastive" not in c["class"]],
        ids=lambda case: case["name"],
    )
    def test_normalization(self, case, ascii):
        # The file holds the kernel as the constructor left it, divided by its sum.
        fields = {"kernel": torch7_tensor(case["kernel_after_ctor"]).numpy()}
        if "Divisive" in case["class"]:
            fields["threshold"] = case["extra"][0] if case["extra"] else 1e-4
            fields["thresval"] = case["extra"][-1] if case["extra"] else 1e-4
        layer = Object(case["class"], nInputPlane=case["nInputPlane"], **fields)
        self.check(layer, case, ascii, 2e-5 if "float" in case["name"] else 1e-12)


class TestLayers:
    """Layers of which there are no vectors, against torch's own functions."""

    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 7, 8)))

    @staticmethod
    def mean(x, kernel, stride, padding, ceil_mode, counts, divides):
        """THNN's SpatialAveragePooling as loops, and what its Lua code multiplies by."""
        sides = list(zip(x.shape[2:], kernel, stride, padding, strict=True))
        counted = [window_count(*side, ceil_mode) for side in sides]
        result = torch.zeros(*x.shape[:2], *counted, dtype=x.dtype)
        for i in range(counted[0]):
            for j in range(counted[1]):
                whole, parts = 1, []
                for at, (size, taps, step, pad) in zip((i, j), sides, strict=True):
                    start = at * step - pad
                    whole *= min(start + taps, size + pad) - start
                    parts.append(slice(max(start, 0), min(start + taps, size)))
                window = x[:, :, parts[0], parts[1]]
                divisor = whole if counts else window[0, 0].numel()
                result[:, :, i, j] = window.sum((2, 3)) / divisor
        return result if divides else result * kernel[0] * kernel[1]

    @pytest.mark.parametrize("divides", [True, False, None])
    @pytest.mark.parametrize("counts", [True, False])
    @pytest.mark.parametrize("ceil_mode", [True, False])
    @pytest.mark.parametrize("padding", [(0, 0), (0, 1), (1, 1)])
    def test_average_pooling(self, padding, ceil_mode, counts, divides):
        layer = pooling("SpatialAveragePooling", (3, 2), 2, ceil_mode=ceil_mode)
        layer.fields |= {"padH": padding[0], "padW": padding[1], "count_include_pad": counts}
        if divides is not None:
            layer.fields["divide"] = divides
        expected = self.mean(self.x, (2, 3), (2, 2), padding, ceil_mode, counts, divides)
        torch.testing.assert_close(net(layer)(self.x), expected)

    def test_average_pooling_of_old_files(self):
        layer = Object("nn.SpatialAveragePooling", kW=3, kH=2, dW=2, dH=2)  # before March 2015
        torch.testing.assert_close(net(layer)(self.x), F.avg_pool2d(self.x, (2, 3), 2) * 6)
        # Without ceil_mode torch/nn overwrites the padding.
        layer.fields |= {"divide": True, "padW": 1, "padH": 1}
        torch.testing.assert_close(net(layer)(self.x), F.avg_pool2d(self.x, (2, 3), 2))

    def test_max_pooling(self):
        layer = pooling("SpatialMaxPooling", (3, 2), 2, ceil_mode=True)
        layer.fields["padH"] = 1
        expected = F.max_pool2d(self.x, (2, 3), 2, (1, 0), ceil_mode=True)
        assert torch.equal(net(layer)(self.x), expected)

    def test_convolution_with_stride_padding_and_no_bias(self):
        weight = np.random.default_rng(2).standard_normal((4, 3, 2, 3))
        layer = Object(
            "nn.SpatialConvolution",
            **{"nInputPlane": 3, "nOutputPlane": 4, "kW": 3, "kH": 2, "dW": 2, "dH": 1},
            **{"padW": 2, "padH": 1, "weight": weight},
        )
        expected = F.conv2d(self.x, torch.from_numpy(weight), None, (1, 2), (1, 2))
        torch.testing.assert_close(net(layer)(self.x), expected)
        del layer.fields["padW"], layer.fields["padH"]
        layer.fields["padding"] = 1  # its name before 2015
        expected = F.conv2d(self.x, torch.from_numpy(weight), None, (1, 2), 1)
        torch.testing.assert_close(net(layer)(self.x), expected)
        layer.fields["padW"] = 0  # torch/nn does not look at it beside the old field
        torch.testing.assert_close(net(layer)(self.x), expected)
        del layer.fields["padding"], layer.fields["padW"]
        expected = F.conv2d(self.x, torch.from_numpy(weight), None, (1, 2))
        torch.testing.assert_close(net(layer)(self.x), expected)

    def test_divisive_threshold(self):
        fields = {"kernel": np.ones(3), "threshold": 1e3, "thresval": 4.0}
        layer = Object("nn.SpatialDivisiveNormalization", **fields)
        assert torch.equal(net(layer)(self.x), self.x / 4)
        del layer.fields["thresval"]
        assert torch.equal(net(layer)(self.x), self.x / 1e3)

    def test_activations(self):
        torch.testing.assert_close(net(Object("nn.Sigmoid"))(self.x), self.x.sigmoid())
        assert torch.equal(net(Object("nn.Identity"))(self.x), self.x)
        dropout = net(Object("nn.Dropout", p=0.25, v2=True))
        assert dropout[0].p == 0.25 and torch.equal(dropout(self.x), self.x)
        assert (dropout.train()(self.x) == 0).any()

    def test_thresholds(self):
        def each(function):
            values = [function(v) for v in self.x.flatten().tolist()]
            return torch.tensor(values, dtype=torch.float64).view(self.x.shape)

        cases = [
            (Object("nn.ReLU", threshold=0, val=0), lambda v: max(v, 0)),
            (Object("nn.ReLU"), lambda v: max(v, 0)),
            (Object("nn.ReLU", threshold=0.1, val=0), lambda v: v if v > 0.1 else 0),
            (Object("nn.Threshold", threshold=0.5, val=-2), lambda v: v if v > 0.5 else -2),
            (Object("nn.HardTanh"), lambda v: min(max(v, -1), 1)),
            (Object("nn.HardTanh", min_val=-0.2, max_val=2), lambda v: min(max(v, -0.2), 2)),
            (Object("nn.MulConstant", constant_scalar=-3.5), lambda v: -3.5 * v),
            (Object("nn.Square"), lambda v: v * v),
            (Object("nn.Power", pow=3), lambda v: v**3),
            (Object("nn.Power", pow=0.5), lambda v: v**0.5 if v >= 0 else float("nan")),
            (Object("nn.Sqrt"), lambda v: v**0.5 if v >= 0 else float("nan")),
            (Object("nn.Sqrt", eps=9), lambda v: (v + 9) ** 0.5),
        ]
        for layer, function in cases:
            result = net(layer)(self.x)
            torch.testing.assert_close(result, each(function), equal_nan=True)
        zero = torch.zeros(1, requires_grad=True)
        net(Object("nn.Sqrt", eps=0))(zero).backward()
        assert zero.grad == 0  # as torch/nn's

    def test_their_text(self):
        """It is in checkpoints, which are of another network where it differs."""
        for layer, text in (
            (Object("nn.MulConstant", constant_scalar=-3.5), "_Scale(-3.5)"),
            (Object("nn.Power", pow=3), "_Power(3)"),
            (Object("nn.Sqrt", eps=9), "_Sqrt(eps=9)"),
            (
                Object("nn.View", size=long_storage(6, 2), numInputDims=3),
                "_View([6, 2], dimensions=3)",
            ),
            (Object("cudnn.SoftMax"), "_WholeSample("),
        ):
            assert text in str(net(layer))

    def test_zero_padding(self):
        layer = Object("nn.SpatialZeroPadding", pad_l=1, pad_r=2, pad_t=0, pad_b=-3)
        expected = torch.zeros(2, 3, 4, 11, dtype=torch.float64)
        expected[..., 1:9] = self.x[:, :, :4]
        assert torch.equal(net(layer)(self.x), expected)

    @pytest.mark.parametrize("shape", [(3,), (3, 5)])
    def test_contrastive(self, shape):
        kernel = np.random.default_rng(4).random(shape) + 0.1
        fields = {"nInputPlane": 3, "kernel": kernel, "threshold": 0.6, "thresval": 2.0}
        layer = Object("nn.SpatialContrastiveNormalization", **fields)
        expected = contrastive_norm2d(self.x, torch.from_numpy(kernel), 0.6, 2.0)
        torch.testing.assert_close(net(layer)(self.x), expected)
        del layer.fields["thresval"]
        expected = contrastive_norm2d(self.x, torch.from_numpy(kernel), 0.6, 0.6)
        torch.testing.assert_close(net(layer)(self.x), expected)

    @pytest.mark.parametrize("package", ["nn", "cudnn"])
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("old", [True, False])
    @pytest.mark.parametrize("spatial", [True, False])
    def test_batch_normalization(self, spatial, old, affine, package):
        rng = np.random.default_rng(5)
        mean, variance, weight, bias = (rng.random(3) + 0.1 for _ in range(4))
        fields = {"running_mean": mean, "eps": 1e-3, "momentum": 0.2, "affine": affine}
        if affine:
            fields |= {"weight": weight, "bias": bias}
        if old:  # 1 / sqrt(variance + eps)
            fields["running_std"] = (variance + 1e-3) ** -0.5
        else:
            fields["running_var"] = variance
        name = f"{package}.{'Spatial' if spatial else ''}BatchNormalization"
        layer = versioned(Object(name, **fields), 1 if old else 2)
        x = self.x if spatial else self.x[..., 0, 0]
        rows = x.movedim(1, -1).numpy()
        expected = (rows - mean) / np.sqrt(variance + 1e-3)
        expected = expected * weight + bias if affine else expected
        result = net(layer)(x).movedim(1, -1)
        torch.testing.assert_close(result, torch.from_numpy(expected))

    @pytest.mark.parametrize("name", ["nn.Reshape", "nn.View"])
    @pytest.mark.parametrize(
        ("sizes", "shape"),
        [((168,), (2, 168)), ((-1,), (2, 168)), ((8, 21), (2, 8, 21)), ((4, -1), (2, 4, 42))],
    )
    def test_reshape(self, name, sizes, shape):
        layer = Object(name, size=long_storage(*sizes), numElements=168)
        for n in (2, 1, 0):
            assert torch.equal(net(layer)(self.x[:n]), self.x[:n].reshape(n, *shape[1:]))

    @pytest.mark.parametrize(
        ("dimensions", "sizes", "shape"),
        [
            # A first -1 is the batch, as there is no other.
            (None, (-1, 168), (2, 168)),
            (None, (-1, 84), (4, 84)),
            (None, (84,), (4, 84)),  # what is left joins the batch
            (None, (3, 7, 4), (4, 3, 7, 4)),
            (3, (-1, 168), (2, 1, 168)),
            (3, (168,), (2, 168)),
            (3, (84,), (4, 84)),
            (3, (4, -1, 2), (2, 4, 21, 2)),
            (2, (-1,), (6, 56)),
            (2, (28,), (12, 28)),
            (2, (8, 7), (6, 8, 7)),
            (4, (-1, 3), (112, 3)),  # a single sample
        ],
    )
    def test_view(self, dimensions, sizes, shape):
        layer = Object("nn.View", size=long_storage(*sizes))
        if dimensions is not None:
            layer.fields["numInputDims"] = dimensions
        assert torch.equal(net(layer)(self.x), self.x.reshape(shape))

    def test_views_that_do_not_fit(self):
        for name in ("nn.View", "nn.Reshape"):
            with pytest.raises(RuntimeError):
                net(Object(name, size=long_storage(5)))(self.x)
        # torch/nn's Reshape makes the batch of the first dimension, whatever remains.
        with pytest.raises(RuntimeError):
            net(Object("nn.Reshape", size=long_storage(84)))(self.x)
        result = net(Object("nn.Reshape", size=long_storage(-1, 84)))(self.x)
        assert torch.equal(result, self.x.reshape(2, 2, 84))

    @pytest.mark.parametrize("name", ["nn.Reshape", "nn.View"])
    @pytest.mark.parametrize("size", [168, -1])
    def test_matrices_for_a_linear_layer(self, name, size):
        """The engine of training knows Flatten."""
        weight = np.random.default_rng(6).standard_normal((4, 168))
        layers = Object(name, size=long_storage(size), numInputDims=3), linear(weight=weight)
        model = net(*layers)
        assert type(model[0]) is torch.nn.Flatten
        expected = F.linear(self.x.flatten(1), torch.from_numpy(weight))
        torch.testing.assert_close(model(self.x), expected)

    def test_lp_pooling_of_other_parts(self):
        """Where it is no LP pooling, it is what its parts are."""
        mean = F.avg_pool2d(self.x**2, 2, 2)
        layer = lp_pooling(2, 2, 2)
        assert type(net(layer)[0]) is ops_nn.LPPool2d
        parts = layer.fields["modules"]
        parts[1].fields["padW"] = 1
        expected = (F.avg_pool2d(self.x**2, 2, 2, (0, 1)) * 4).sqrt()
        torch.testing.assert_close(net(layer)(self.x), expected)
        parts[1].fields["padW"], parts[2].fields["constant_scalar"] = 0, 3
        torch.testing.assert_close(net(layer)(self.x), (mean * 3).sqrt())
        parts[2].fields["constant_scalar"], parts[3].fields["eps"] = 4, 0.25
        torch.testing.assert_close(net(layer)(self.x), (mean * 4 + 0.25).sqrt())
        # January to March 2015: a pooling that sums, and no constant.
        del parts[2], parts[1].fields["divide"]
        parts[2].fields["eps"] = 0
        assert type(net(layer)[0]) is ops_nn.LPPool2d
        torch.testing.assert_close(net(layer)(self.x), (mean * 4).sqrt())
        parts[1].fields["divide"] = True
        torch.testing.assert_close(net(layer)(self.x), mean.sqrt())
        other = lp_pooling(4, 2, 2)
        assert type(net(other)[0]) is ops_nn.LPPool2d
        other.fields["modules"][3].fields["pow"] = 0.5
        expected = (F.avg_pool2d(self.x**4, 2, 2) * 4).sqrt()
        torch.testing.assert_close(net(other)(self.x), expected)

    def test_cudnn(self):
        def layer(name, **fields):
            return Object(f"cudnn.{name}", **fields)

        weight = np.random.default_rng(7).standard_normal((4, 1, 2, 3))
        x = self.x[:, [0, 1, 2, 0]]
        convolved = layer(
            "SpatialConvolution",
            **{"nInputPlane": 4, "nOutputPlane": 4, "kW": 3, "kH": 2, "dW": 2, "dH": 1},
            **{"padW": 2, "padH": 1, "groups": 4, "weight": weight, "bias": np.arange(4.0)},
        )
        planes = [
            F.conv2d(x[:, [i]], torch.from_numpy(weight[[i]]), None, (1, 2), (1, 2)) + i
            for i in range(4)
        ]
        torch.testing.assert_close(net(convolved)(x), torch.cat(planes, 1))
        expected = F.max_pool2d(self.x, 2, 2, ceil_mode=True)
        assert torch.equal(net(cudnn_pool("Max", ceil_mode=True))(self.x), expected)
        expected = F.avg_pool2d(self.x, 2, 2, (0, 1))  # always counts the padding
        for fields in ({}, {"count_include_pad": False}, {"divide": True}):
            result = net(cudnn_pool("Average", padW=1, **fields))(self.x)
            torch.testing.assert_close(result, expected)
        whole = (self.x.exp() / self.x.exp().sum((1, 2, 3), keepdim=True)).log()
        channels = (self.x.exp() / self.x.exp().sum(1, keepdim=True)).log()
        for name, expected in [
            ("ReLU", self.x.clamp(min=0)),
            ("ClippedReLU", self.x.clamp(0, 0.5)),
            ("Tanh", self.x.tanh()),
            ("Sigmoid", 1 / (1 + (-self.x).exp())),
            ("SoftMax", whole.exp()),
            ("LogSoftMax", whole),
            ("SpatialSoftMax", channels.exp()),
            ("SpatialLogSoftMax", channels),
        ]:
            fields = {"ceiling": 0.5} if name == "ClippedReLU" else {}
            torch.testing.assert_close(net(layer(name, **fields))(self.x), expected)
        fields = {"algorithm": "CUDNN_SOFTMAX_LOG", "mode": "CUDNN_SOFTMAX_MODE_INSTANCE"}
        result = net(layer("SpatialSoftMax", **fields))(self.x)
        torch.testing.assert_close(result, whole)

    def test_half_precision_beside_single(self):
        """As cudnn has it: batch normalization stays in single precision."""
        ones = np.ones(2, np.float32)
        layers = [
            linear(weight=cuda(np.full((2, 3), 0.5, np.float16), "CudaHalf")),
            versioned(
                Object("cudnn.BatchNormalization", running_mean=cuda(ones), running_var=cuda(ones)),
                2,
            ),
        ]
        model = net(*layers)
        assert model[0].weight.dtype == model[1].running_mean.dtype == torch.float32
        expected = torch.full((1, 2), 0.5 / (1 + 1e-5) ** 0.5)
        torch.testing.assert_close(model(torch.ones(1, 3)), expected)

    def test_nested_and_alone(self):
        layer = Object("nn.Tanh")
        inner = sequential(Object("nn.Sigmoid"), sequential(layer))
        expected = self.x.sigmoid().tanh().relu()
        torch.testing.assert_close(net(inner, Object("nn.ReLU"))(self.x), expected)
        alone = load_net(io.BytesIO(save(Object("nn.Tanh"))))
        assert torch.equal(alone(self.x), self.x.tanh())
        empty = load_net(io.BytesIO(save(Object("nn.Sequential", modules={}))))
        assert torch.equal(empty(self.x), self.x)

    def test_dtypes(self):
        weight = np.ones((2, 3))
        for dtype in (np.float64, np.float32, np.float16):
            model = net(Object("nn.Linear", weight=weight.astype(dtype)))
            assert model[0].weight.dtype == torch.from_numpy(weight.astype(dtype)).dtype
        assert model[0].weight.requires_grad and model[0].bias is None

    @pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])
    def test_a_whole_network(self, ascii):
        model = load_net(io.BytesIO(small_net(ascii)))
        kinds = [type(module) for module in model]
        assert kinds[:5] == [
            torch.nn.Conv2d,
            torch.nn.Tanh,
            ops_nn.LPPool2d,
            ops_nn.SubtractiveNorm2d,
            torch.nn.MaxPool2d,
        ]
        assert isinstance(model[-1], torch7.LogSoftmax)
        before = torch.get_rng_state()
        scores = model(torch.zeros(5, 1, 8, 8, dtype=torch.float64))
        assert scores.shape == (5, 3) and torch.equal(before, torch.get_rng_state())

    def test_torch7_is_its_public_place(self, tmp_path):
        (tmp_path / "a.net").write_bytes(small_net())
        assert len(torch7.load_net(tmp_path / "a.net")) == 8
        assert "load_net" in torch7.__all__

    def test_loading_draws_no_random_numbers(self):
        before = torch.get_rng_state()
        load_net(io.BytesIO(small_net()))
        assert torch.equal(before, torch.get_rng_state())


class TestSoftmax:
    """torch/nn's exponential was approximate on the CPU until April and May 2016."""

    rows = torch.from_numpy(np.random.default_rng(8).standard_normal((3, 10)) * 3)
    maps = torch.from_numpy(np.random.default_rng(9).standard_normal((2, 5, 3, 4)))

    @staticmethod
    def exponential(z):
        """THExpMinusApprox, in Python's floats."""
        w = 1 + z * (0.125 + z * (0.0078125 + z * (0.00032552083 + z * 1.0172526e-5)))
        return w**-8 if z < 13 else 0.0

    def approximate(self, log):
        result = []
        for row in self.rows.tolist():
            exponentials = [self.exponential(max(row) - v) for v in row]
            total = math.fsum(exponentials)
            logs = [v - max(row) - math.log(total) for v in row]
            result.append(logs if log else [e / total for e in exponentials])
        return torch.tensor(result, dtype=torch.float64)

    @pytest.mark.parametrize("log", [True, False])
    def test_choices(self, log):
        layer = Object("nn.LogSoftMax" if log else "nn.SoftMax")
        exact = log_softmax(self.rows, 1) if log else log_softmax(self.rows, 1).exp()
        close = {"rtol": 0, "atol": 1e-12}
        for choice, expected in [
            ("approximate", self.approximate(log)),
            ("auto", self.approximate(log)),  # nothing tells
            ("exact", exact),
        ]:
            model = net(layer, log_softmax=choice)
            torch.testing.assert_close(model(self.rows), expected, **close)
        assert (self.approximate(log) - exact).abs().max() > 1e-6
        path = io.BytesIO(save(sequential(layer)))
        torch.testing.assert_close(
            torch7.load_net(path, log_softmax="exact")(self.rows), exact, **close
        )
        with pytest.raises(ValueError, match="must be 'auto', 'approximate' or 'exact', got 'x'"):
            net(layer, log_softmax="x")

    @pytest.mark.parametrize(
        "name", ["LogSoftMax", "SoftMax", "SpatialLogSoftMax", "SpatialSoftMax"]
    )
    @pytest.mark.parametrize("choice", ["approximate", "exact"])
    def test_maps(self, name, choice):
        """Over the channels; torch/nn's log-softmax of maps has always been exact."""
        expected = log_softmax(self.maps, 1)
        tolerance = 1e-12
        if "Log" not in name:
            expected, tolerance = expected.exp(), 1e-12 if choice == "exact" else 1e-4
        result = net(Object(f"nn.{name}"), log_softmax=choice)(self.maps)
        torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)
        if tolerance > 1e-12:
            assert (result - expected).abs().max() > 1e-9
            torch.testing.assert_close(result.sum(1), torch.ones(2, 3, 4).double())

    @pytest.mark.parametrize(
        ("evidence", "exact"),
        [
            (Object("nn.Identity", output=cuda(np.ones(3, np.float32))), True),
            (Object("nn.Identity", x=Storage(np.ones(3, np.float16), "CudaHalf")), True),
            (Object("cudnn.Tanh"), True),
            (Object("nn.Dropout", p=0, v2=True, stochastic_inference=False), True),
            (Object("nn.HardTanh", min_val=-9, max_val=9, inplace=False), True),
            (Object("nn.HardTanh", min_val=-9, max_val=9), False),
            (Object("nn.Dropout", p=0, v2=True), False),
            (Object("nn.Identity", output=np.ones(3, np.float32)), False),
        ],
    )
    def test_what_tells(self, evidence, exact):
        model = net(evidence, Object("nn.LogSoftMax"))
        assert type(model[-1]) is (ops_nn.LogSoftmax if exact else torch7.LogSoftmax)

    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    @pytest.mark.parametrize("exact", [True, False])
    def test_stored_output_tells(self, exact, dtype):
        logs = log_softmax(self.rows, 1) if exact else self.approximate(log=True)
        for output in (logs.numpy().astype(dtype), logs[0].numpy().astype(dtype)):
            # Also which one its softmax was.
            model = net(Object("nn.SoftMax"), Object("nn.LogSoftMax", output=output))
            assert type(model[1]) is (ops_nn.LogSoftmax if exact else torch7.LogSoftmax)
            assert type(model[0]) is (ops_nn.Softmax if exact else torch7.Softmax)

    @pytest.mark.parametrize(
        "output",
        [
            np.zeros((2, 10)),  # cleared
            np.full(4, np.nan),
            np.array([0.0, -1000.0]),  # the two agree
            np.arange(3),
            np.ones((1, 2, 3)),
            np.zeros(0),
            3,
            TensorOf(Storage(np.ones(1)), (2**30, 2**20), (0, 0)),
        ],
        ids=lambda output: str(getattr(output, "shape", output))[:20],
    )
    def test_outputs_that_tell_nothing(self, output):
        assert type(net(Object("nn.LogSoftMax", output=output))[0]) is torch7.LogSoftmax

    def test_the_originals_own_output(self):
        """The layer cut out of the file of February 2016 holds the output of a sample."""
        with open(REFERENCE / "torch7" / "logsoftmax.net", "rb") as file:
            assert type(load_net(file)[0]) is torch7.LogSoftmax
        output = load(REFERENCE / "torch7" / "logsoftmax.net").fields["output"]
        assert torch7_network._agrees_with_approximation(output) is True


def linear(**fields):
    return Object("nn.Linear", **{"weight": np.ones((2, 3)), **fields})


def changed(layer, **fields):
    layer.fields.update(fields)
    return layer


def pool(**fields):
    return changed(pooling("SpatialMaxPooling", 2, 2), **fields)


def conv(**fields):
    return changed(convolution(np.ones((2, 9)), np.ones(2), 1, 3), **fields)


def cudnn_pool(name, **fields):
    layer = pool(**{"ceil_mode": False, **fields})
    layer.class_name = f"cudnn.Spatial{name}Pooling"
    return layer


def twice():
    layer = Object("nn.Tanh")
    return sequential(layer, layer)


def endless():
    network = sequential()
    network.fields["modules"].append(network)
    return network


class TestUnsupported:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (3, "its object is no layer but 3"),
            ({"model": Object("nn.Tanh")}, "its object is no layer but a table"),
            (np.ones(3), "its object is no layer but a tensor of torch.float64"),
            (sequential(Object("nn.Tanh"), 7), "layer 2 is no layer but 7"),
            (
                sequential(Object("nn.Tanh"), sequential(Object("nn.VolumetricConvolution"))),
                r"layer 2\.1 is of the class nn\.VolumetricConvolution, which is not supported",
            ),
            (
                Object("nn.Sequential"),
                r"\(nn.Sequential\): modules must be a list of layers, got n",
            ),
            (twice(), r"layer 2 \(nn.Tanh\): it occurs twice"),
            (endless(), r"layer 1 \(nn.Sequential\): it occurs twice"),
            (linear(weight=np.ones(3)), "weight must have two dimensions"),
            (
                linear(weight=np.ones((2, 3), int)),
                "weight must be a floating point tensor, got a t",
            ),
            (linear(weight=None), "weight must be a floating point tensor, got nothing"),
            (linear(bias=np.ones(3)), r"bias must have shape \(2,\), got \(3,\)"),
            (linear(bias="x"), "bias must be a floating point tensor, got 'x'"),
            (
                conv(nInputPlane=2),
                r"weight must have shape \(2, 18\) or \(2, 2, 3, 3\), got \(2, 9",
            ),
            (conv(kW=0), "kW must be a whole number >= 1, got 0"),
            (conv(dH=1.5), "dH must be a whole number >= 1, got 1.5"),
            (conv(padH="1"), "padH must be a number, got '1'"),
            (conv(padW=1025), "the layers pad images by more than 1024 pixels"),
            (
                Object("nn.SpatialZeroPadding", pad_l=1025, pad_r=0, pad_t=0, pad_b=0),
                "the layers pad images by more than 1024 pixels",
            ),
            (
                Object("nn.SpatialZeroPadding", pad_l=0.5, pad_r=0, pad_t=0, pad_b=0),
                "pad_l, pad_r, pad_t and pad_b must be whole numbers",
            ),
            (Object("nn.HardTanh", min_val=1, max_val=1), "min_val must be less than max_val"),
            (Object("cudnn.ClippedReLU", ceiling=0), "ceiling must be > 0, got 0"),
            (
                Object("nn.BatchNormalization", running_mean=np.ones(3), running_var=np.ones(2)),
                r"running_var must have shape \(3,\), got \(2,\)",
            ),
            (
                versioned(
                    Object(
                        "nn.BatchNormalization", running_mean=np.ones(3), running_std=np.ones(3)
                    ),
                    2,
                ),
                "running_var must be a floating point tensor, got nothing",
            ),
            (
                Object("nn.Dropout", p=0.5, v2=True, stochastic_inference=True),
                "stochastic_inference is not supported",
            ),
            (cudnn_pool("Max", ceil_mode=True, padW=1), "ceil_mode with padding is not supported"),
            (cudnn_pool("Average", ceil_mode=True), "ceil_mode is not supported"),
            (cudnn_pool("Average", divide=False), "divide must be true"),
            (
                Object("nn.View", size=long_storage(4), numInputDims=0),
                "numInputDims must be a whole number >= 1, got 0",
            ),
            (conv(nOutputPlane=2**40), "nOutputPlane must be a whole number >= 1"),
            (pool(kH=None), "kH must be a number, got nothing"),
            (pool(kH=True), "kH must be a number, got True"),
            (pool(padW=2), r"the padding \(0, 2\) is more than half of the window \(2, 2\)"),
            (pool(ceil_mode=1), "ceil_mode must be true or false, got 1"),
            (changed(lp_pooling(2, 2, 2), modules={}), "it is made of nothing"),
            (
                changed(lp_pooling(2, 2, 2), modules=[Object("nn.SpatialSubSampling")]),
                r"layer 1 is of the class nn\.SpatialSubSampling, which is not supported",
            ),
            (Object("nn.Dropout", p=1, v2=True), r"p must be in \[0, 1\), got 1"),
            (Object("nn.Dropout", p=0.5), "its first version, which scales when it predicts"),
            (Object("nn.Reshape", size=[3]), "size must be a torch.LongStorage, got a table"),
            (Object("nn.Reshape", size=long_storage(-1, -1, -1)), "cannot make the size"),
            (Object("nn.View", size=long_storage(0)), "cannot make the size"),
            (Object("nn.View", size=long_storage()), "cannot make the size"),
            (
                Object("nn.SpatialSubtractiveNormalization", kernel=np.ones(4)),
                "SpatialSubtractiveNormalization.*odd",
            ),
            (
                Object("nn.SpatialSubtractiveNormalization", kernel=np.array([1.0, -2.0, 1.0])),
                "sum must be finite and not 0, got 0.0",
            ),
            (
                sequential(linear(), linear(weight=np.ones((2, 2), np.float32))),
                "its layers have several dtypes: torch.float32, torch.float64",
            ),
        ],
        ids=lambda value: value[-30:] if isinstance(value, str) else "",
    )
    def test_error_names_the_layer(self, value, message, tmp_path):
        path = tmp_path / "some.net"
        path.write_bytes(save(value))
        load(path)  # as objects it can be read
        with pytest.raises(Torch7FileError, match=rf"some\.net: .*{message}") as caught:
            load_net(path)
        assert "\n" not in str(caught.value)

    def test_an_expanded_tensor_is_no_way_to_get_memory(self):
        storage = Storage(np.ones(4))
        huge = TensorOf(storage, (2**28, 2**28), (0, 0))
        assert read(save(huge)).shape == (2**28, 2**28)
        with pytest.raises(Torch7FileError, match=r"layer 1 \(nn.Linear\): the layers' tensors"):
            net(Object("nn.Linear", weight=huge))
        storage = Storage(np.ones((100, 100)))
        layers = [Object("nn.Linear", weight=TensorOf(storage, (100, 100))) for _ in range(300)]
        with pytest.raises(Torch7FileError, match=r"layer [23]\d .*tensors are many times larger"):
            net(*layers)
        assert len(net(*layers[:5])) == 5  # layers may share, within reason


def function(index=1):
    """A Lua function as Torch7 writes it: compiled code and its upvalues."""
    return struct.pack("<iii", 8, index, 4) + b"\x1bLua" + save({})


class TestDamage:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"PK\x03\x04 and so on", r"is not a Torch7 file: it begins with b'PK"),
            (b"hello world", "is not a Torch7 file: it begins with b'hello wo'"),
            (b"\x09\x00\x00\x00", "is not a Torch7 file"),
            (b"\x03\x00", "is not a Torch7 file"),
            (b"\x01\x00\x00\x00\x00", "is truncated at byte 5: 8 bytes were to follow from byte 4"),
            (function(), r"holds a Lua function before byte 4: compiled code is never loaded"),
            (struct.pack("<i", 6), "holds a Lua function"),
            (struct.pack("<i", 7), "holds a Lua function"),
            (struct.pack("<iiiidi", 3, 1, 1, 1, 1.0, 99), "there is no type of objects 99"),
            (struct.pack("<ii", 5, 7), "a boolean is 7"),
            (struct.pack("<ii", 2, -1), "a string's length is -1"),
            (struct.pack("<ii", 2, 2**31 - 1), "is truncated at byte 8: 2147483647 bytes"),
            (struct.pack("<iii", 3, 1, 2**31 - 1), "is truncated at byte 12"),
            (struct.pack("<iii", 3, 1, -5), "a table's size is -5"),
            (struct.pack("<iiiii", 3, 1, 1, 0, 0), "a table's key is nil"),
            (struct.pack("<iiiidi", 3, 1, 1, 1, float("nan"), 0), "a table's key is not a number"),
            (struct.pack("<iii", 3, 1, 2) + save(7) * 4, "a table has the key 7 twice"),
            (save(1.5) + b"x", "is damaged: its object ends at byte 12, 1 more follow"),
            (save(1.5) * 2, "its object ends at byte 12, 12 more follow"),
            (struct.pack("<iii", 4, 1, 3) + b"V 1" + struct.pack("<i", 3) + b"a b", "has the name"),
            (save(Object("torch.Timer"))[:-12] + save(5), "of the class torch.Timer, which is sto"),
            (b"1\nx\n", "is no number"),
            (b"1\n", "is truncated at byte 2"),
            (b"1\n_\n", "a number is missing"),
            (b"2\n99999999999\n", "a number is too large for its type"),
            (gzip.compress(save("x" * 99))[:-9], "is truncated: its packed data has no end"),
            (lzma.compress(save("x" * 99))[:-30], "is truncated: its packed data has no end"),
            (lzma.compress(b"")[:6] + b"nonsense" * 4, "is damaged: it cannot be unpacked"),
            (gzip.compress(b"")[:10] + b"\xff" * 20, "is damaged: it cannot be unpacked"),
            (gzip.compress(gzip.compress(save(1))), "is not a Torch7 file"),
            (lzma.compress(b""), "is empty"),
        ],
        ids=lambda value: value[:30] if isinstance(value, str) else "",
    )
    def test_error_names_the_file_and_the_place(self, content, message, tmp_path):
        path = tmp_path / "some.net"
        path.write_bytes(content)
        for reader in (load, load_net):
            with pytest.raises(Torch7FileError, match=rf"some\.net {message}|{message}") as caught:
                reader(path)
            assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("size", "stride", "offset", "message"),
        [
            ((3, 4), (4, 1), 2, r"of size \[3, 4\] reaches beyond its storage of 12"),
            ((2, 2), (2**62, 2**62), 1, r"of size \[2, 2\] reaches beyond its storage"),
            ((2**31, 2**31), (0, 0), 1, r"has size \[2147483648, 2147483648\]"),
            ((0, 2**62), (1, 1), 1, "has size"),
            ((-1, 4), (4, 1), 1, "has size"),
            ((3,), (-1,), 3, "has size"),
            ((3,), (1,), 0, "has size"),
        ],
    )
    def test_tensors_stay_within_their_storage(self, size, stride, offset, message):
        tensor = TensorOf(Storage(np.arange(12.0)), size, stride, offset)
        with pytest.raises(Torch7FileError, match=f"a torch.DoubleTensor {message}"):
            read(save(tensor))

    def test_storages_of_another_kind(self):
        floats = TensorOf(Storage(np.ones(4, np.float32)), (4,))
        floats.class_name = "torch.DoubleTensor"
        with pytest.raises(Torch7FileError, match="has a storage of another type"):
            read(save(floats))
        lying = TensorOf(Storage(np.ones(4)), (4,))
        lying.storage = TensorOf(Storage(np.ones(1)), (4,), (0,))  # a tensor for a storage
        with pytest.raises(Torch7FileError, match="has a storage of another type"):
            read(save(lying))
        lying.storage = None
        with pytest.raises(Torch7FileError, match=r"of size \[4\] has no storage"):
            read(save(lying))
        many = TensorOf(Storage(np.ones(1)), (1,) * 65)
        with pytest.raises(Torch7FileError, match="a tensor has 65 dimensions"):
            read(save(many))

    def test_depth(self):
        def nested(levels):
            value = []
            for _ in range(levels):
                value = [value]
            return value

        assert read(save(nested(80)))
        content = b"".join(struct.pack("<iiiid", 3, i, 1, 1, 1.0) for i in range(50_000))
        with pytest.raises(Torch7FileError, match="is nested deeper than 100 levels at byte"):
            read(content)

    def test_bombs(self, tmp_path):
        """Little data that asks for much memory or time."""
        path = tmp_path / "bomb.net"
        zeros = struct.pack("<ii", 2, 2**28) + bytes(2**24)
        for pack in (lzma.compress, gzip.compress):
            path.write_bytes(pack(zeros))
            tracemalloc.start()
            with pytest.raises(Torch7FileError, match=r"bomb\.net is larger than 1,000,000 bytes"):
                load(path, max_bytes=1_000_000)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2e7  # unpacked it takes three times as much
        path.write_bytes(zeros)
        with pytest.raises(Torch7FileError, match=r"is larger than 1,000,000 bytes when unpacked"):
            load(path, max_bytes=1_000_000)

    def test_number_of_objects(self, monkeypatch):
        """Empty tables would take twenty times the file's memory, and a minute."""
        monkeypatch.setattr(torch7_files, "_MAX_OBJECTS", 1000)
        value = [{} for _ in range(499)]
        assert len(read(save(value))) == 499  # with keys, values and the list itself 999
        with pytest.raises(Torch7FileError, match="holds more than 1,000 objects"):
            read(save([*value, {}]))

    def test_no_file(self, tmp_path):
        with pytest.raises(Torch7FileError, match=r"nothing\.net does not exist"):
            load_net(tmp_path / "nothing.net")
        with pytest.raises(Torch7FileError, match="is not a file"):
            load_net(tmp_path)

    @pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])
    def test_every_truncation_is_noticed(self, ascii):
        content = small_net(ascii)
        # The last byte of a text is a line end.
        for length in range(0, len(content) - ascii, 7):
            with pytest.raises(Torch7FileError):
                load_net(io.BytesIO(content[:length]))

    @pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])
    def test_random_damage(self, ascii):
        """Whatever bytes change: a network or a Torch7FileError, and no memory to speak of."""
        content = small_net(ascii)
        rng = random.Random(5)
        outcomes = {"network": 0, "error": 0}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(500):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 8))):
                place = rng.randrange(len(damaged))
                kind = rng.randrange(4)
                if kind == 0:
                    damaged[place] ^= 1 << rng.randrange(8)
                elif kind == 1:
                    damaged[place] = rng.choice((0, 1, 3, 4, 8, 0x7F, 0x80, 0xFF, 0x2D, 0x39))
                elif kind == 2:
                    del damaged[place : place + rng.choice((1, 4, 8))]
                else:
                    damaged[place:place] = damaged[: rng.choice((4, 8, 40))]
            try:
                load_net(io.BytesIO(bytes(damaged)))
                outcomes["network"] += 1
            except Torch7FileError as error:
                outcomes["error"] += 1
                assert "\n" not in str(error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
        assert grown < 100_000
        assert min(outcomes.values()) > 20, outcomes


class TestOriginal:
    def test_the_network_in_float32(self):
        """The original's parameters in a file as it writes them; its whole result is in
        test_predict."""
        model = load_net(FLOAT32_NET)
        parameters = list(model.parameters())
        assert sum(p.numel() for p in parameters) == 310_346
        ours = models.convnet(dtype=torch.float32)
        with torch.no_grad():
            for mine, theirs in zip(ours.parameters(), parameters, strict=True):
                mine.copy_(theirs)
            x = torch.randn(3, 1, 32, 32)
            torch.testing.assert_close(model(x), ours.eval()(x), rtol=0, atol=1e-6)

    @pytest.mark.skipif(
        ORIGINAL_NET is None,
        reason="MNIST_OPS_TORCH7_NET does not name the network that the original system saved",
    )
    def test_the_original_file(self):
        model = load_net(ORIGINAL_NET)
        digits = data.prepare("global")
        confusion, _ = training.evaluate(model, digits.test_images, digits.test_labels)
        assert confusion.total == 0.9879
        for full, half in zip(model.parameters(), load_net(FLOAT32_NET).parameters(), strict=True):
            assert torch.equal(full.float(), half)


def test_contents_that_may_be_torch7s():
    assert torch7_files.is_torch7(save(1)) and torch7_files.is_torch7(save(1, ascii=True))
    assert torch7_files.is_torch7(gzip.compress(b"")) and torch7_files.is_torch7(
        FLOAT32_NET.read_bytes()
    )
    for other in (b"", b"PK\x03\x04\x00\x00", b"\x93NUMPY", b"\x00\x00\x08\x03"):
        assert not torch7_files.is_torch7(other)
