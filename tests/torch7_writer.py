"""Torch7's torch.save once more: objects of these classes to the bytes of a file.

Written from the format's rules and for the tests only; it shares nothing with the reader.
"""

from __future__ import annotations

import struct

import numpy as np

KINDS = {
    "float64": ("Double", "d"),
    "float32": ("Float", "f"),
    "float16": ("Half", "e"),
    "int64": ("Long", "q"),
    "int32": ("Int", "i"),
    "int16": ("Short", "h"),
    "int8": ("Char", "b"),
    "uint8": ("Byte", "B"),
}


class Object:
    """A Torch7 object with a Lua table of fields."""

    version = 1

    def __init__(self, class_name, **fields):
        self.class_name = class_name
        self.fields = fields


class Table:
    """A Lua table by its entries, whose keys may be tables themselves."""

    def __init__(self, *entries):
        self.entries = entries


class Tds:
    """``tds.Hash`` with pairs of keys and values, or ``tds.Vec`` with values."""

    version = 0

    def __init__(self, class_name, *entries):
        self.class_name = class_name
        self.entries = entries


class Storage:
    """``torch.DoubleStorage`` and so on; kind ``"Cuda"`` and so on for those of the GPU."""

    version = 1

    def __init__(self, values, kind=None):
        self.values = np.asarray(values).reshape(-1)
        name, self.code = KINDS[str(self.values.dtype)]
        self.class_name = f"torch.{kind or name}Storage"


class TensorOf:
    """A tensor on a storage that it may share; offset from 1."""

    version = 1

    def __init__(self, storage, size, stride=None, offset=1):
        self.storage = storage
        self.size = list(size)
        steps = [int(np.prod(self.size[i + 1 :])) for i in range(len(self.size))]
        self.stride = steps if stride is None else list(stride)
        self.offset = offset
        self.class_name = storage.class_name.replace("Storage", "Tensor")


class Writer:
    """Args: as text; or of a machine of this byte order, whose longs have so many bytes."""

    def __init__(self, ascii=False, order="<", long_size=8):
        self.ascii = ascii
        self.order = order
        self.long = {4: "i", 8: "q"}[long_size]
        self.parts = []
        self.seen = {}
        self.alive = []  # an index belongs to an id, so nothing may be freed meanwhile

    def numbers(self, code, values):
        if not self.ascii:
            code = self.long if code == "q" else code
            self.parts.append(struct.pack(f"{self.order}{len(values)}{code}", *values))
        elif code in "bB":
            self.chars(bytes(value % 256 for value in values))
        elif len(values):
            style = {"d": "%.17g", "f": "%.9g", "e": "%.9g"}.get(code, "%d")
            self.parts.append(b" ".join((style % v).encode() for v in values) + b"\n")

    def chars(self, text):
        self.parts.append(text + (b"\n" if self.ascii and text else b""))

    def string(self, text):
        text = text.encode("utf-8", "surrogateescape")
        self.numbers("i", [len(text)])
        self.chars(text)

    def is_new(self, value):
        """Write the index of what may be referred to again."""
        new = id(value) not in self.seen
        self.alive.append(value)
        self.numbers("i", [self.seen.setdefault(id(value), len(self.seen) + 1)])
        return new

    def write(self, value):
        if value is None:
            self.numbers("i", [0])
        elif isinstance(value, bool):
            self.numbers("i", [5, int(value)])
        elif isinstance(value, (int, float)):
            self.numbers("i", [1])
            self.numbers("d", [value])
        elif isinstance(value, str):
            self.numbers("i", [2])
            self.string(value)
        elif isinstance(value, (dict, list, Table)):
            self.numbers("i", [3])
            if self.is_new(value):
                if isinstance(value, Table):
                    entries = value.entries
                elif isinstance(value, dict):
                    entries = tuple(value.items())
                else:
                    entries = tuple(enumerate(value, 1))
                self.numbers("i", [len(entries)])
                for key, entry in entries:
                    self.write(key)
                    self.write(entry)
        elif isinstance(value, np.ndarray):
            self.write(TensorOf(Storage(value), value.shape))
        else:
            self.numbers("i", [4])
            if self.is_new(value):
                self.string(f"V {value.version}")
                self.string(value.class_name)
                self.body(value)
        return self

    def body(self, value):
        if isinstance(value, Storage):
            self.numbers("q", [len(value.values)])
            self.numbers(value.code, value.values.tolist())
        elif isinstance(value, TensorOf):
            self.numbers("i", [len(value.size)])
            self.numbers("q", value.size)
            self.numbers("q", value.stride)
            self.numbers("q", [value.offset])
            self.write(value.storage if value.size else None)
        elif isinstance(value, Tds):
            self.numbers("q", [len(value.entries)])
            for entry in value.entries:
                for part in entry if value.class_name == "tds.Hash" else [entry]:
                    self.write(part)
        else:
            self.write(value.fields)


def save(value, ascii=False, order="<", long_size=8):
    """The bytes of ``torch.save(file, value)``."""
    return b"".join(Writer(ascii, order, long_size).write(value).parts)


def versioned(value, version):
    """An object whose class had that version."""
    value.version = version
    return value


def cuda(values, kind="Cuda"):
    """A tensor of the GPU: ``torch.CudaTensor``, ``torch.CudaDoubleTensor`` and so on."""
    values = np.asarray(values)
    return TensorOf(Storage(values, kind=kind), values.shape)


def long_storage(*values):
    return Storage(np.array(values, dtype=np.int64))


def sequential(*modules, **fields):
    return Object("nn.Sequential", modules=list(modules), train=True, **fields)


def convolution(weight, bias, inputs, kernel, stride=1, padding=0, name="SpatialConvolutionMM"):
    """Arrays or ``TensorOf`` as weight and bias."""
    outputs = (weight.size if isinstance(weight, TensorOf) else weight.shape)[0]
    sides = {"kW": kernel, "kH": kernel, "dW": stride, "dH": stride}
    return Object(
        f"nn.{name}",
        nInputPlane=inputs,
        nOutputPlane=outputs,
        **sides,
        padW=padding,
        padH=padding,
        weight=weight,
        bias=bias,
    )


def pooling(name, kernel, stride, **fields):
    width, height = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    sides = {"kW": width, "kH": height, "dW": stride, "dH": stride}
    return Object(f"nn.{name}", **sides, padW=0, padH=0, **fields)


def lp_pooling(power, kernel, stride):
    """As Torch7 builds it: a power, the mean, times the window's size, the root."""
    if power == 2:
        first, last = Object("nn.Square"), Object("nn.Sqrt", eps=0)
    else:
        first, last = Object("nn.Power", pow=power), Object("nn.Power", pow=1.0 / power)
    mean = pooling(
        "SpatialAveragePooling",
        kernel,
        stride,
        ceil_mode=False,
        count_include_pad=True,
        divide=True,
    )
    times = Object("nn.MulConstant", inplace=False, constant_scalar=kernel * kernel)
    sides = {"kW": kernel, "kH": kernel, "dW": stride, "dH": stride}
    return Object("nn.SpatialLPPooling", **sides, modules=[first, mean, times, last])


def every_kind():
    """A network with a layer of every kind, and a table with objects of every other kind."""
    rng = np.random.default_rng(0)
    storage = Storage(rng.standard_normal(20).round(3))
    ones = np.ones(2)
    statistics = {"running_mean": ones, "running_var": ones, "eps": 1e-5}
    network = sequential(
        Object("nn.SpatialZeroPadding", pad_l=1, pad_r=1, pad_t=0, pad_b=-1),
        convolution(TensorOf(storage, (2, 9)), TensorOf(storage, (2,), offset=19), 1, 3, padding=1),
        versioned(Object("nn.SpatialBatchNormalization", **statistics), 2),
        Object("nn.Threshold", threshold=0.1, val=0),
        lp_pooling(2, 2, 2),
        lp_pooling(3, 2, 1),
        Object("nn.SpatialContrastiveNormalization", kernel=np.array([1, 2, 1.0]), threshold=0.1),
        pooling("SpatialAveragePooling", 2, 1, ceil_mode=True, count_include_pad=False),
        Object("nn.View", size=long_storage(-1, 3), numInputDims=3),
        sequential(
            Object("nn.HardTanh", min_val=-1, max_val=1),
            Object("nn.Linear", weight=rng.standard_normal((3, 8)).round(3), bias=np.ones(3)),
            Object("nn.Dropout", p=0.5, v2=True, train=True),
        ),
        Object("nn.LogSoftMax", output=np.log([0.5, 0.25, 0.25])),
    )
    key = {"a": 1}
    other = {
        "table": Table((key, "x"), (Object("nngraph.Node", id=1), [True, None])),
        "tds": Tds("tds.Hash", ("k", Tds("tds.Vec", 1, "two"))),
        "gpu": cuda(np.arange(4, dtype=np.float16), "CudaHalf"),
    }
    return network, other


def original_network(parameters, dtype):
    """Report 1's network as the original saves it, less gradients and outputs.

    ``parameters`` are its 310,346 numbers in order; as in the original all layers share a storage.
    """
    storage = Storage(np.asarray(parameters, dtype=dtype))
    assert len(storage.values) == 310_346
    offset = 1

    def part(*size):
        nonlocal offset
        tensor = TensorOf(storage, size, offset=offset)
        offset += int(np.prod(size))
        return tensor

    def normalization():
        taps = np.exp(-0.5 * ((np.arange(7) - 3) / (0.25 * 7)) ** 2)
        # The constructor divides by the sum and the number of maps.
        return Object(
            "nn.SpatialSubtractiveNormalization",
            nInputPlane=64,
            kernel=(taps / (taps.sum() * 64)).astype(dtype),
        )

    return sequential(
        convolution(part(64, 25), part(64), 1, 5),
        Object("nn.Tanh"),
        lp_pooling(2, 2, 2),
        normalization(),
        convolution(part(64, 1600), part(64), 64, 5),
        Object("nn.Tanh"),
        lp_pooling(2, 2, 2),
        normalization(),
        Object(
            "nn.Reshape", size=long_storage(1600), nelement=1600, batchsize=long_storage(0, 1600)
        ),
        Object("nn.Linear", weight=part(128, 1600), bias=part(128)),
        Object("nn.Tanh"),
        Object("nn.Linear", weight=part(10, 128), bias=part(10)),
        Object("nn.LogSoftMax"),
    )
