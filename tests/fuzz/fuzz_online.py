"""Random calls of the online engine's raw operators: small networks, and hostile text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fuzz_references as references
import torch
from fuzz_arguments import Args, Draw, absurd, describe
from fuzz_cases import PROPER, Case, Expected, Library, compare, first_line, same_bits
from torch import Tensor
from torch.nn import functional as F

from mnist_ops import torch7

Layer = Callable[[Tensor], Tensor]
NUMBERS = "0 -1 1 2 3 9 1e9 2147483648 4611686018427387904 9223372036854775807 -9223372036854775808"
WORDS = (*NUMBERS.split(), "99999999999999999999", "nan", "inf", "-inf", "1e400", "0x10", "1.5", "")
WORDS += ("two", "\0", "ä" * 50, "%s%n", "linear", "1" * 5000, "-", "+1", "1e-320")
KINDS = ("conv2d", "linear", "identity", "tanh", "relu", "sigmoid", "flatten", "log_softmax_torch7")
KINDS += ("log_softmax", "lp_pool2d", "max_pool2d", "avg_pool2d", "subtractive_norm2d", "dropout")


class Network:
    """Layers as the engine's text, as functions in float64, and their tensors."""

    def __init__(self, draw: Draw, dtype: torch.dtype) -> None:
        self.draw, self.dtype = draw, dtype
        self.lines: list[str] = []
        self.layers: list[Callable[[Tensor, list[Tensor]], Tensor]] = []
        self.parameters: list[Tensor] = []
        self.kernels: list[Tensor] = []
        pick = draw.random.choice
        if draw.chance(0.3):
            self.shape: tuple[int, ...] = (pick((1, 3, 8, 9)),)
        else:
            size = draw.random.randint(3, 9)
            self.shape = (pick((1, 1, 2, 3, 9)), size, draw.random.randint(3, 9))
        self.empty = draw.chance(0.04)
        if self.empty:
            sizes = list(self.shape)
            sizes[draw.random.randrange(len(sizes))] = 0
            self.shape = tuple(sizes)
        self.input_shape = self.shape
        if len(self.shape) == 3:
            for _ in range(draw.random.randint(0, 4)):
                pick(
                    (self.convolution, self.convolution, self.activation, self.pooling, self.norm)
                )()
            self.add("flatten", lambda x, _: x.flatten(), (math.prod(self.shape),))
        for _ in range(draw.random.randint(0, 2)):
            pick((self.linear, self.activation))()
        self.linear()
        self.classes = self.shape[0]
        if draw.chance(0.6):
            beta = pick((1.0, -1.0, 2.0))
            self.add(f"log_softmax {beta}", lambda x, _: torch.log_softmax(beta * x, 0), self.shape)

    def add(
        self, line: str, layer: Callable[[Tensor, list[Tensor]], Tensor], shape: tuple[int, ...]
    ) -> None:
        self.lines.append(f"{line} layer{len(self.lines)}")
        self.layers.append(layer)
        self.shape = shape

    def parameter(self, *shape: int) -> int:
        layout = self.draw.random.choice(("contiguous", "contiguous", "sliced", "transposed"))
        tensor = self.draw.tensor(shape, self.dtype, layout=layout)
        tensor.mul_(1 / max(1, math.prod(shape[1:])) ** 0.5)
        self.parameters.append(tensor)
        return len(self.parameters) - 1

    def convolution(self) -> None:
        c, h, w = self.shape
        outputs = self.draw.random.choice((1, 2, 3, 8, 9))
        kernel = [self.draw.random.randint(1, max(1, min(3, size))) for size in (h, w)]
        padding = [self.draw.random.choice((0, 0, 1, 2)) for _ in "hw"]
        bias = self.draw.chance(0.7)
        weight = self.parameter(outputs, c, *kernel)
        if bias:
            self.parameter(outputs)
        sizes = [max(0, s + 2 * p - k + 1) for s, p, k in zip((h, w), padding, kernel, strict=True)]
        self.add(
            f"conv2d {outputs} {kernel[0]} {kernel[1]} {padding[0]} {padding[1]} {int(bias)}",
            lambda x, p: F.conv2d(
                x[None], p[weight], p[weight + 1] if bias else None, padding=tuple(padding)
            )[0],
            (outputs, *sizes),
        )

    def linear(self) -> None:
        outputs, bias = self.draw.random.choice((1, 2, 5, 8, 9)), self.draw.chance(0.7)
        weight = self.parameter(outputs, *self.shape)
        if bias:
            self.parameter(outputs)
        self.add(
            f"linear {outputs} {int(bias)}",
            lambda x, p: F.linear(x, p[weight], p[weight + 1] if bias else None),
            (outputs,),
        )

    def activation(self) -> None:
        name = self.draw.random.choice(tuple(references.ACTIVATIONS))
        self.add(name, lambda x, _: references.ACTIVATIONS[name](x), self.shape)

    def pooling(self) -> None:
        _, h, w = self.shape
        if 0 in self.shape:
            return
        pick = self.draw.random.choice
        kernel = [self.draw.random.randint(1, max(1, min(3, size))) for size in (h, w)]
        stride = list(kernel) if self.draw.chance(0.5) else [pick((1, 2)), pick((1, 2, 3))]
        padding = [self.draw.random.randint(0, k // 2) for k in kernel]
        ceil_mode = self.draw.chance(0.3)
        numbers = " ".join(map(str, (*kernel, *stride, *padding, int(ceil_mode))))
        options: Args = {"stride": stride, "padding": padding, "ceil_mode": ceil_mode}
        kind = pick(("lp", "max", "avg"))
        if kind == "lp":
            p = pick((1.0, 2.0, 3.0, 2.5, math.inf))
            windows = (p, kernel, stride, padding, ceil_mode)
            line, layer = f"lp_pool2d {p} {numbers}", lambda x: references.lp_pool2d(x, *windows)
        elif kind == "max":
            line, layer = f"max_pool2d {numbers}", lambda x: F.max_pool2d(x, kernel, **options)
        else:
            count, divisor = self.draw.chance(0.5), pick((0, 0, 3))
            options |= {"count_include_pad": count, "divisor_override": divisor or None}
            line = f"avg_pool2d {numbers} {int(count)} {divisor}"

            def layer(x: Tensor) -> Tensor:
                return F.avg_pool2d(x, kernel, **options)

        shape = layer(torch.zeros(1, *self.shape, dtype=torch.float64)).shape[1:]
        self.add(line, lambda x, _: layer(x[None])[0], tuple(shape))

    def norm(self) -> None:
        if 0 in self.shape:
            return
        kernel = self.draw.tensor((self.draw.random.choice((1, 3, 5)),), torch.float64)
        kernel = kernel.abs() + 0.1
        self.kernels.append(kernel)
        self.add(
            "subtractive_norm2d",
            lambda x, _: references.subtractive_norm2d(x, kernel),
            self.shape,
        )


def loss_of(kind: int, output: Tensor, target: int) -> Tensor:
    name = ("nll_loss", "multi_margin_loss", "mse_loss")[kind]
    return getattr(torch7, name)(output[None], torch.tensor([target]), reduction="sum")


def reference(network: Network, args: Args) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Parameters, losses, predictions and velocities after the steps of OnlineSGD's docstring."""
    weights = [p.detach().double() for p in args["parameters"]]
    speeds = [v.detach().double() for v in args["velocities"]]
    losses, predictions = [], []
    started = args["started"]
    for i, sample in enumerate(args["order"].tolist()):
        leaves = [w.clone().requires_grad_() for w in weights]
        x = args["images"][sample].to(network.dtype).double()
        for layer in network.layers:
            x = layer(x, leaves)
        loss = loss_of(args["loss"], x, int(args["labels"][sample]))
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        losses.append(loss.detach())
        predictions.append(x.detach().argmax())
        rate = args["lr"] / (1 + (args["step"] + i) * args["lr_decay"])
        for k, g in enumerate(found):
            g = torch.zeros_like(weights[k]) if g is None else g
            g = g + args["weight_decay"] * weights[k]
            if speeds:
                first = not started and i == 0
                m, keep = args["momentum"], 1 - args["dampening"]
                speeds[k] = g if first else m * speeds[k] + keep * g
                g = g + m * speeds[k] if args["nesterov"] else speeds[k]
            weights[k] = weights[k] - rate * g
    empty = torch.zeros(0, dtype=torch.float64)
    stacked = torch.stack(losses) if losses else empty
    return weights, stacked, torch.stack(predictions) if losses else empty.long(), speeds


def draw_arguments(draw: Draw) -> tuple[Network, Args]:
    dtype = draw.random.choice((torch.float64, torch.float64, torch.float32))
    network = Network(draw, dtype)
    count, steps = draw.random.randint(1, 4), draw.random.choice((0, 1, 2, 5))
    images = draw.tensor(
        (count, *network.input_shape), draw.random.choice((torch.float64, torch.float32))
    )
    labels = torch.randint(0, network.classes, (count,), generator=draw.generator)
    order = torch.randint(0, count, (steps,), generator=draw.generator)
    momentum = draw.random.choice((0.0, 0.0, 0.9))
    started = momentum > 0 and draw.chance(0.5)
    velocities = []
    if momentum:
        velocities = [draw.tensor(tuple(p.shape), dtype) for p in network.parameters]
        velocities = [v if started else torch.zeros_like(v) for v in velocities]
        velocities = [v.clone() for v in velocities]  # none that are expanded: they are written to
    return network, {
        "parameters": network.parameters,
        "velocities": velocities,
        "network": "\n".join(network.lines),
        "kernels": network.kernels,
        "images": images,
        "labels": labels,
        "order": order,
        "uniform": torch.empty(0, dtype=torch.float64),
        "loss": draw.random.choice((0, 1, 2)),
        "step": draw.random.choice((0, 3, 10**6)),
        "lr": draw.random.choice((1e-3, 0.01)),
        "lr_decay": draw.random.choice((0.0, 1e-3)),
        "weight_decay": draw.random.choice((0.0, 0.1)),
        "momentum": momentum,
        "dampening": draw.random.choice((0.0, 0.9)) if momentum else 0.0,
        "nesterov": bool(momentum) and draw.chance(0.3),
        "started": started,
        "threads": draw.random.choice((1, 1, 2)),
    }


def hostile_text(draw: Draw, text: str) -> Any:
    """A network's text with something in it that no module would write."""
    pick, lines = draw.random.choice, text.split("\n")
    what = pick(("word", "word", "word", "line", "twice", "gone", "many", "raw", "order"))
    i = draw.random.randrange(len(lines))
    words = lines[i].split(" ")
    if what == "word":
        words[draw.random.randrange(len(words))] = pick(WORDS)
        lines[i] = pick((" ", " ", "  ", "\t")).join(words)
    elif what == "line":
        numbers = [pick(("0", "1", "2", "3", *WORDS)) for _ in range(draw.random.randint(0, 10))]
        lines.insert(i, " ".join([pick(KINDS), *numbers]))
    elif what == "twice":
        lines.insert(i, lines[i])
    elif what == "gone":
        del lines[i]
    elif what == "many":
        line = pick(
            ("tanh", "flatten", "identity", "", "avg_pool2d 1 1 1 1 0 0 0 0 0", "dropout 0.5",
             "max_pool2d 2 2 1 1 1 1 0", "lp_pool2d 3 2 2 1 1 1 1 0", "conv2d 1 1 1 9999 9999 0",
             "max_pool2d 2147483646 2147483646 1 1 1073741823 1073741823 0")
        )  # fmt: skip
        lines[i:i] = [line] * pick((2, 30, 3000))
    elif what == "raw":
        return pick(("", "\n", "\0", " ", "\n" * 1000, "x" * 100000, None, 3, b"tanh", "tanh"))
    else:
        draw.random.shuffle(lines)
    return pick(("\n", "\n", "\n", "\r\n", "\n\n")).join(lines)


def case(draw: Draw, library: Library, hostile: bool) -> Case:
    """Train a random network for some steps."""
    network, args = draw_arguments(draw)
    on_cuda_only = not library.emulated and draw.chance(0.05)
    changed = hostile or network.empty or on_cuda_only
    if hostile:
        for _ in range(draw.random.choice((1, 1, 2))):
            key = "network" if draw.chance(0.5) else draw.random.choice(list(args))
            args[key] = corrupted(draw, key, args[key])
    models = draw.random.choice((1, 1, 2, 3)) if library.emulated and not changed else 1
    name, positional = "online_sgd", list(args.values())
    if library.emulated or on_cuda_only:
        name, positional = "online_sgd_models", several(draw, args, models)
    op = getattr(library.ops, name)

    def text() -> str:
        shown = ", ".join(shown_list(value) for value in positional)
        return f"torch.ops.{library.namespace}.{name}({shown})"

    def run() -> tuple[str, str | None]:
        if library.configure is not None:
            library.configure(draw.random)
        tensors = tensors_of(positional[:2])
        written = [t for t in tensors if not t.is_meta and t.numel() < 10**6]
        before = [t.detach().clone() for t in written]
        expected = None if changed else reference(network, args)
        try:
            result = op(*positional)
        except (*PROPER, OverflowError, MemoryError) as error:
            if not changed:
                return "valid", f"{type(error).__name__} for a valid network: {first_line(error)}"
            kept = all(same_bits(a, b) for a, b in zip(before, written, strict=True))
            return "unclear", None if kept else f"parameters changed, then: {first_line(error)}"
        except Exception as error:
            return "unclear", f"{type(error).__name__} is no proper error: {first_line(error)}"
        if expected is None:
            return "unclear", None
        if references.magnitude(*expected[0], expected[1]) > 1e3:
            return "unclear", None  # the training diverges
        return "valid", differs(expected, result, written, models, args)

    return Case(f"{name}", text, run)


def differs(
    expected: Any, result: Any, written: list[Tensor], models: int, args: Args
) -> str | None:
    """What is wrong with what a training left and returned."""
    weights, losses, predictions, speeds = expected
    dtype = args["parameters"][0].dtype
    got = [result[0][0], result[1][0]] if models > 1 or result[0].dim() == 2 else list(result)
    if models > 1 and not all(same_bits(result[0][0], other) for other in result[0][1:]):
        return "models that are the same were trained differently"
    # Kinks and nearly equal scores: rounding decides, in float32.
    loosen = 1e3 if dtype == torch.float64 else 3e2
    wide = [("losses", got[0], losses)]
    wide += [(f"parameter {i}", written[i], w) for i, w in enumerate(weights)]
    after = models * len(weights)
    wide += [(f"velocity {i}", written[after + i], v) for i, v in enumerate(speeds)]
    for what, actual, want in wide:
        scale = loosen * (1.0 + references.magnitude(want))
        wrong = compare(what, actual, Expected(want, scale, dtype))
        if wrong:
            return wrong
    if dtype == torch.float64 and not torch.equal(got[1], predictions):
        return f"predictions {got[1].tolist()}, must be {predictions.tolist()}"
    return None


def several(draw: Draw, args: Args, models: int) -> list[Any]:
    """The arguments of ``online_sgd_models``, for copies of one model."""
    copies = dict(args)
    for key in ("parameters", "velocities", "kernels"):
        value = args[key]
        if isinstance(value, list) and models > 1:
            value = value + [t.clone() for _ in range(models - 1) for t in value]
        copies[key] = value
    order, settings = args["order"], None
    if isinstance(order, Tensor) and order.dim() == 1:
        order = order.expand(models, -1)
    names = ("lr", "lr_decay", "weight_decay", "momentum", "dampening", "step", "started")
    try:
        settings = torch.tensor([[float(args[n]) for n in names]] * models, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        settings = torch.zeros(models, 3)
    first = [copies[key] for key in ("parameters", "velocities", "network", "kernels")]
    data = [args["images"], args["labels"], order, args["uniform"], args["loss"]]
    return [*first, *data, settings, args["nesterov"]]


def corrupted(draw: Draw, key: str, value: Any) -> Any:
    """Something else in the place of an argument."""
    pick = draw.random.choice
    if key == "network":
        return hostile_text(draw, value) if isinstance(value, str) else value
    if key in ("order", "labels") and isinstance(value, Tensor) and draw.chance(0.5):
        changed = value.clone()
        if changed.numel() and not changed.is_meta and changed.dtype is torch.int64:
            changed.view(-1)[-1] = pick((-1, 10**6, 2**62, -(2**63)))
        return changed
    if isinstance(value, list):
        what = pick(("gone", "twice", "absurd", "absurd", "empty", "same", "none"))
        if what == "empty":
            return []
        if what == "none":
            return pick((None, 1, "x", [None], [1]))
        if not value:
            return [torch.zeros(3, dtype=torch.float64)]
        i = draw.random.randrange(len(value))
        if what == "gone":
            return value[:i] + value[i + 1 :]
        if what == "twice":
            return [*value, value[i]]
        if what == "same" and isinstance(value[i], Tensor):  # memory that two parameters share
            other = value[i]
            alike = [isinstance(t, Tensor) and t.shape == other.shape for t in value]
            return [other if same else t for t, same in zip(value, alike, strict=True)]
        return [absurd(draw, t) if k == i else t for k, t in enumerate(value)]
    return absurd(draw, value)


def tensors_of(values: list[Any]) -> list[Tensor]:
    return [t for v in values if isinstance(v, list) for t in v if isinstance(t, Tensor)]


def shown_list(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(describe(v) for v in value)}]"
    return describe(value)
