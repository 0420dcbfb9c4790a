"""The reports' networks, built from :mod:`mnist_ops.nn`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as ops_nn
from .. import torch7
from ..ops import gaussian1d

__all__ = ["convnet", "count_parameters"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "sigmoid": ops_nn.Sigmoid,
}


def _per_stage(name: str, value: Any, stages: int) -> list[Any]:
    """One entry per stage from a single value or a sequence of the right length."""
    if isinstance(value, (list, tuple)):
        if len(value) != stages:
            raise ValueError(
                f"convnet: {name} must be one value or {stages}, got {len(value)}: {value!r}"
            )
        return list(value)
    return [value] * stages


def _activation(value: str | Callable[[], nn.Module]) -> tuple[str, nn.Module]:
    if callable(value):
        module = value()
        return type(module).__name__.lower(), module
    if value not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"convnet: activation must be {known} or a callable, got {value!r}")
    return value, _ACTIVATIONS[value]()


#: The activations that a fused stage can begin with, by the module that it then stands for.
_FUSABLE: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    ops_nn.Sigmoid: "sigmoid",
    nn.Identity: "identity",
}


def _pool(kind: str, size: int, norm_type: float) -> nn.Module:
    if kind == "lp":
        return ops_nn.LPPool2d(norm_type, size, size)
    return (nn.MaxPool2d if kind == "max" else nn.AvgPool2d)(size, size)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"convnet: {name} must be an integer >= {least}, got {value!r}")


def convnet(
    widths: Sequence[int] = (64, 64, 128),
    activation: str | Callable[[], nn.Module] | Sequence[Any] = "tanh",
    kernel_size: int | Sequence[int] = 5,
    padding: int | Sequence[int] = 0,
    pooling: str | Sequence[str | None] | None = "lp",
    pool_size: int | Sequence[int] = 2,
    norm_type: float = 2.0,
    norm_kernel: int | Tensor | Sequence[Any] | None = 7,
    dropout: float = 0.0,
    in_channels: int = 1,
    image_size: int = 32,
    num_classes: int = 10,
    log_softmax: str | None = "torch7",
    output_activation: str | Callable[[], nn.Module] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch7.Generator | None = None,
    fused: bool = True,
) -> nn.Sequential:
    """The reports' convolutional network; the defaults are the original one.

    Every stage is convolution, activation, pooling, subtractive normalization; after the last
    come a fully connected layer with its activation and the classifier. The original network maps
    ``(N, 1, 32, 32)`` over 28, 14, 10 and 5 pixels to ``(N, 10)`` and has 310,346 parameters.

    Arguments marked (*) take one value for all stages or a sequence with one per stage.

    Args:
        widths: channels of each convolution, then the units of the fully connected layer. Any
            number of convolutions: ``(64, 64, 128)`` has two, ``(32, 64, 128, 256)`` three.
        activation: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or a callable that returns a module; a
            sequence gives one per entry of ``widths``.
        kernel_size: (*) side of the square filters.
        padding: (*) zero padding of the convolution.
        pooling: (*) ``"lp"``, ``"max"``, ``"avg"`` or ``None``.
        pool_size: (*) side and stride of the pooling window. LP pooling of size 1 is the absolute
            value, and stays; the other kinds have nothing to do then, and go.
        norm_type: the p of LP pooling.
        norm_kernel: (*) taps of the Gaussian of the subtractive normalization, a kernel tensor,
            or ``None`` for no normalization.
        dropout: probability of dropping a unit before the classifier.
        in_channels: channels of the images.
        image_size: their side in pixels.
        num_classes: scores per image.
        log_softmax: ``"torch7"`` (approximate, see :func:`mnist_ops.torch7.log_softmax`),
            ``"exact"``, or ``None`` to end with the classifier's scores.
        output_activation: put after the classifier and before the log-softmax; ``"tanh"`` with
            ``log_softmax=None`` for the reports' MSE runs.
        dtype: of the parameters and kernels; PyTorch's default unless given.
        device: where they live; PyTorch's default unless given.
        generator: if given, :func:`mnist_ops.torch7.initialize` draws the initial values from it,
            and dropout its masks; otherwise both are PyTorch's own.
        fused: let one :class:`mnist_ops.nn.Stage2d` do what follows the convolution in every stage
            that has LP pooling, a normalization, and tanh, ReLU or sigmoid. The results are those
            of the separate layers but for rounding; parameters, their names and initial values are
            the same, so either network loads the other's ``state_dict``.

    Returns:
        A :class:`torch.nn.Sequential` with layers named ``conv1, stage1, conv2, ...``, or where a
        stage is not fused ``conv1, tanh1, pool1, norm1, conv2, ...``.

    Raises:
        ValueError: for an impossible argument, or where the map shrinks to nothing.

    Source: report 1, sections 3.1 to 3.5.

    Example::

        >>> convnet()(torch.zeros(1, 1, 32, 32)).shape
        torch.Size([1, 10])
        >>> three_layer = convnet((32, 64, 128, 256), pool_size=(2, 2, 1))  # report 1's
        >>> count_parameters(three_layer)
        292618
    """
    if len(widths) < 2:
        raise ValueError(
            "convnet: widths needs one convolution and the fully connected layer at least, "
            f"got {tuple(widths)}"
        )
    for width in widths:
        _check_count("every entry of widths", width, 1)
    for name, value in [
        ("in_channels", in_channels),
        ("image_size", image_size),
        ("num_classes", num_classes),
    ]:
        _check_count(name, value, 1)
    if log_softmax not in ("torch7", "exact", None):
        raise ValueError(
            f"convnet: log_softmax must be 'torch7', 'exact' or None, got {log_softmax!r}"
        )
    if not norm_type > 0.0:
        raise ValueError(f"convnet: norm_type must be > 0, got {norm_type!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"convnet: dropout must be in [0, 1), got {dropout}")

    stages = len(widths) - 1
    activations = _per_stage("activation", activation, len(widths))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size = in_channels, image_size
    options = zip(
        widths[:-1],
        _per_stage("kernel_size", kernel_size, stages),
        _per_stage("padding", padding, stages),
        _per_stage("pooling", pooling, stages),
        _per_stage("pool_size", pool_size, stages),
        _per_stage("norm_kernel", norm_kernel, stages),
        strict=True,
    )
    for stage, (width, taps, pad, kind, pool, norm) in enumerate(options, 1):
        _check_count("kernel_size", taps, 1)
        _check_count("padding", pad, 0)
        _check_count("pool_size", pool, 1)
        if kind not in ("lp", "max", "avg", None):
            raise ValueError(f"convnet: pooling must be 'lp', 'max', 'avg' or None, got {kind!r}")
        before, size = size, size + 2 * pad - taps + 1
        if size < 1:
            raise ValueError(
                f"convnet: stage {stage} has a {before}x{before} map, too small for "
                f"kernel_size {taps} with padding {pad}: use a smaller kernel or more padding"
            )
        layers[f"conv{stage}"] = nn.Conv2d(channels, width, taps, padding=pad)
        name, module = _activation(activations[stage - 1])
        parts = {f"{name}{stage}": module}
        # LP pooling of one element is (|x|^p)^(1/p) = |x|.
        if kind is not None and (pool > 1 or kind == "lp"):
            before, size = size, size // pool
            if size < 1:
                raise ValueError(
                    f"convnet: stage {stage} has a {before}x{before} map after the convolution, "
                    f"too small for pool_size {pool}: use a smaller kernel, more padding, or a "
                    "smaller pool_size in this stage"
                )
            parts[f"pool{stage}"] = _pool(kind, pool, norm_type)
        if norm is not None:
            kernel = norm if isinstance(norm, Tensor) else gaussian1d(norm)
            parts[f"norm{stage}"] = ops_nn.SubtractiveNorm2d(kernel)
            if fused and kind == "lp" and type(module) in _FUSABLE:
                fusion = ops_nn.Stage2d(kernel, _FUSABLE[type(module)], norm_type, pool)
                parts = {f"stage{stage}": fusion}
        layers.update(parts)
        channels = width

    layers["flatten"] = nn.Flatten()
    layers["linear1"] = nn.Linear(channels * size * size, widths[-1])
    name, module = _activation(activations[-1])
    layers[f"{name}{stages + 1}"] = module
    if dropout > 0.0:
        if generator is None:
            layers["dropout"] = nn.Dropout(dropout)
        else:
            layers["dropout"] = torch7.Dropout(dropout, generator)
    layers["linear2"] = nn.Linear(widths[-1], num_classes)
    if output_activation is not None:
        name, module = _activation(output_activation)
        layers[f"{name}{stages + 2}"] = module
    if log_softmax == "torch7":
        layers["log_softmax"] = torch7.LogSoftmax()
    elif log_softmax == "exact":
        layers["log_softmax"] = ops_nn.LogSoftmax(dim=-1)

    model = nn.Sequential(layers).to(
        device=device or torch.get_default_device(), dtype=dtype or torch.get_default_dtype()
    )
    model.register_load_state_dict_pre_hook(_rename_kernels)
    if generator is not None:
        torch7.initialize(model, generator, in_channels)
    return model


def _rename_kernels(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any, **__: Any
) -> None:
    """Let a fused network load an unfused one's kernels, and the other way round."""
    layers = dict(model.named_children())
    for old, new in (("norm", "stage"), ("stage", "norm")):
        for name in layers:
            stage = name.removeprefix(new)
            if stage != name and f"{old}{stage}" not in layers:
                key = f"{prefix}{old}{stage}.kernel"
                if key in state_dict:
                    state_dict[f"{prefix}{name}.kernel"] = state_dict.pop(key)


def count_parameters(model: nn.Module) -> int:
    """The number of trainable values: 310,346 for the original network."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
