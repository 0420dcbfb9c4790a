"""Predictions of a saved network: what the assignment's result script does.

::

    >>> saved = prediction.load_model("runs/original/checkpoint.pt")     # or Torch7's model.net
    >>> images, labels = data.load("test")
    >>> predictions = prediction.predict(saved, images)
    >>> prediction.write_predictions("predictions.csv", predictions)
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import torch7, training
from ..mnist import data, models
from ..torch7 import files as torch7_files
from ..training.checkpoint import read_checked

__all__ = ["SavedModel", "kernel_of", "load_model", "predict", "read_images", "write_predictions"]

LABELS = ("classes", "digits")

_ZIP, _NPY = b"PK\x03\x04", b"\x93NUMPY"

# No file of images is read that is larger than this: 1.3 million of them.
_MAX_BYTES = 2**30
# The reports' networks have numbers up to 1600 and three layers; a file could ask for anything.
_MAX_NUMBER, _MAX_LENGTH = 10_000, 100

#: What to choose from where a file does not record it.
NORMALIZATIONS = (
    "'none' (global only: report 2, and report 1's \"no normalization\"), "
    "'contrastive' (also local with 7 taps: report 1) or 'contrastiveN' (with N taps)"
)


@dataclass(frozen=True)
class SavedModel:
    """A network that was read from a file, and how the images for it are prepared.

    Attributes:
        model: in evaluation mode.
        path: where it came from.
        normalization: ``"none"``, ``"contrastive"`` or ``"contrastive15"``, see :func:`kernel_of`;
            ``None`` where the file does not say, as Torch7's never do.
        statistics: mean and standard deviation of the training pixels, where the file has them.
    """

    model: nn.Module
    path: Path
    normalization: str | None
    statistics: tuple[float, float] | None = None


def kernel_of(normalization: str) -> int | None:
    """Taps of the local normalization's Gaussian, ``None`` for images normalised globally only.

    Args:
        normalization: ``"none"`` (or ``"global"``), ``"contrastive"`` for the reports' 7 taps, or
            with an odd number of taps: ``"contrastive15"``.

    Raises:
        ValueError: for anything else.
    """
    if normalization in ("none", "global"):
        return None
    match = re.fullmatch(r"contrastive([0-9]{0,3})", normalization)
    taps = int((match and match[1]) or 7)
    if match is None or taps % 2 == 0:
        raise ValueError(
            "normalization must be 'none', 'contrastive' or 'contrastiveN' with N odd, "
            f"got {normalization!r}"
        )
    return taps


def load_model(path: str | os.PathLike[str]) -> SavedModel:
    """A network from a run's folder or a file of Torch7.

    Which of them it is is told by the content. Every checksum in it is compared, and nothing in it
    is executed.

    Args:
        path: one of

            - ``checkpoint.pt`` of :func:`mnist_ops.training.fit`, whose ``settings`` may hold
              ``network`` (keyword arguments of :func:`mnist_ops.mnist.models.convnet`; without it,
              the original network), ``normalization``, ``data_kernel``, ``mean`` and ``std``;
            - ``model.pt``, a ``state_dict``: the settings are those of the checkpoint beside it;
              without one it must fit the original network, and the normalization is not known;
            - Torch7's ``.net``, see :func:`mnist_ops.torch7.load_net`, which does not record the
              normalization: report 1's networks saw contrastive images, report 2's did not.

    Raises:
        CheckpointError, Torch7FileError: if the file is missing, damaged or something else, if it
            asks for more memory than its weights need, or if its numbers cannot be used: weights
            that are NaN or infinite, a standard deviation that is not positive.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise training.CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if torch7_files.is_torch7(head):
        model: nn.Module = torch7.load_net(path)
        if reason := _not_finite(model):
            raise torch7_files.Torch7FileError(f"{path}: {reason}")
        return SavedModel(model, path, None)
    if not head.startswith(_ZIP):
        raise training.CheckpointError(
            f"{path} is neither a checkpoint of mnist_ops nor a network of Torch7"
        )
    settings, weights = _settings_and_weights(path)
    try:
        model = _network(settings.get("network") or {}, weights)
    except Exception as error:  # whatever the settings are made of
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise training.CheckpointError(
            f"{path} does not fit the network that its settings describe: {reason}"
        ) from None
    if reason := _not_finite(model):
        raise training.CheckpointError(f"{path}: {reason}")
    return SavedModel(model.eval(), path, _recorded(path, settings), _statistics(path, settings))


def _settings_and_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    settings: Any
    weights: Any
    state = read_checked(path)
    if isinstance(state, dict) and "format" not in state and _is_state_dict(state):
        try:
            settings = training.load_latest(path.parent)[1]["settings"]
        except training.CheckpointError:
            settings = {}
        weights = state
    else:
        state = training.load_checkpoint(path)
        settings, weights = state.get("settings"), state.get("model")
    if not isinstance(settings, dict) or not _is_state_dict(weights):
        raise training.CheckpointError(f"{path} is a checkpoint without settings or network")
    return settings, weights


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _network(options: Any, weights: dict[str, Tensor]) -> nn.Module:
    """The network that the options describe, with these weights."""
    if not isinstance(options, Mapping):
        raise TypeError(f"network must be a dict, got {type(options).__name__}")
    _check_numbers("network", options)
    # On no device first: a few numbers could ask for any amount of memory. A kernel has no
    # parameters, and at most as many taps as the numbers above may say.
    with torch.device("meta"):
        plan = models.convnet(**{**options, "device": "meta", "norm_kernel": None})
    for name, parameter in plan.named_parameters():
        saved = weights.get(name)
        if saved is None or saved.shape != parameter.shape or not saved.is_floating_point():
            kind = "nothing" if saved is None else f"{saved.dtype} of shape {tuple(saved.shape)}"
            raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {kind}")
    dtype = weights[next(name for name, _ in plan.named_parameters())].dtype
    model = models.convnet(**{**options, "dtype": dtype, "device": "cpu"})
    model.load_state_dict(weights)
    return model


def _check_numbers(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_numbers(str(key), each)
    elif isinstance(value, (list, tuple)):
        if len(value) > _MAX_LENGTH:
            raise ValueError(f"{name} has {len(value):,} entries, more than {_MAX_LENGTH}")
        for each in value:
            _check_numbers(name, each)
    elif isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise ValueError(f"{name} must be at most {_MAX_NUMBER:,}, got {value:,}")


def _not_finite(model: nn.Module) -> str | None:
    """What of a network is not made of finite numbers."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            return (
                f"the network's {name} holds NaN or infinite numbers: the training that made it "
                "has diverged"
            )
    return None


def _recorded(path: Path, settings: dict[str, Any]) -> str | None:
    """The normalization that a run's settings describe."""
    if "normalization" not in settings:
        return None
    name, kernel = settings["normalization"] or "none", settings.get("data_kernel")
    try:
        name = f"{name}{kernel}" if name == "contrastive" and kernel is not None else str(name)
        kernel_of(name)
    except ValueError as error:
        raise training.CheckpointError(f"{path}: its settings' {error}") from None
    return name


def _statistics(path: Path, settings: dict[str, Any]) -> tuple[float, float] | None:
    """Mean and standard deviation, if the settings have them."""
    if "mean" not in settings and "std" not in settings:
        return None
    mean, std = map(_number, (settings.get("mean"), settings.get("std")))
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise training.CheckpointError(
            f"{path} records images of mean {mean} and standard deviation {std}: no image can be "
            "normalised with these"
        )
    return mean, std


def _number(value: Any) -> float:
    plain = type(value) is float or (type(value) is int and abs(value) < 2**63)
    return float(value) if plain else math.nan


def read_images(path: str | os.PathLike[str]) -> Tensor:
    """Images of 28×28 pixels, uint8 ``(N, 1, 28, 28)``, N >= 1.

    Args:
        path: an idx file as MNIST's, packed with gzip or xz or not; or ``(N, 28, 28)`` or
            ``(N, 1, 28, 28)`` uint8 as a tensor (``torch.save``) or an array (``numpy.save``). What
            it is is told by the content. Nothing in it is executed.

    Raises:
        DataError: if the file is missing, damaged, something else, or larger than 1 GiB or, if it
            is packed, than 100 times its packed size (or 16 MiB).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.peek(len(_NPY))
            if not head.startswith((_ZIP, _NPY)):
                return data.read_idx(path, images=True, wary=True, file=file)
            if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                raise data.DataError(f"{path} is larger than {_MAX_BYTES:,} bytes.")
    except OSError as error:
        raise data.DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        if head.startswith(_ZIP):
            images = training.read_torch(path)
        else:
            # Mapped, so that a header's announcement is checked against the file's length.
            images = torch.from_numpy(np.array(np.load(path, mmap_mode="r", allow_pickle=False)))
    except Exception:  # whatever the bytes make the readers stumble over
        raise data.DataError(f"{path} is damaged or does not hold an array of images.") from None
    if not isinstance(images, Tensor):
        raise data.DataError(f"{path} must hold one tensor, got {type(images).__name__}.")
    if images.dim() == 4 and images.shape[1] == 1:
        images = images.squeeze(1)
    if images.dtype != torch.uint8 or images.dim() != 3 or images.shape[1:] != (28, 28):
        raise data.DataError(
            f"{path} must hold uint8 images of shape (N, 28, 28), "
            f"got {images.dtype} of shape {tuple(images.shape)}."
        )
    if len(images) == 0:
        raise data.DataError(f"{path} holds no images.")
    return images.contiguous().unsqueeze(1)


def predict(
    saved: SavedModel,
    images: Tensor,
    normalization: str | None = None,
    root: str | os.PathLike[str] | None = None,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The digits that a network sees, int64 ``(N,)``.

    Args:
        saved: from :func:`load_model`.
        images: uint8 ``(N, 1, 28, 28)``; padded and normalised here as the training images were.
        normalization: see :func:`kernel_of`; what the file records unless given.
        root: a folder with the training data, whose mean and standard deviation serve where the
            file has none; the data that came with the package unless given.
        batch_size: images at a time; it does not change the result beyond rounding.
        device: where to compute.

    Raises:
        ValueError: for an impossible argument, a normalization that is neither given nor recorded,
            or a network that is not one for such images.
        DataError: as for :func:`mnist_ops.mnist.data.load`.
    """
    if batch_size < 1:
        raise ValueError(f"predict: batch_size must be >= 1, got {batch_size}")
    normalization = normalization or saved.normalization
    if normalization is None:
        raise ValueError(
            f"predict: {saved.path} does not record how its images were normalised; name the "
            f"normalization: {NORMALIZATIONS}"
        )
    taps = kernel_of(normalization)
    mean, std = saved.statistics or data.global_statistics(data.load("train", root)[0])
    if not std > 0:
        raise ValueError("predict: the training images are all equal: nothing to normalise with")
    model = saved.model.to(device)
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float64)
    predictions = []
    with torch.no_grad():
        for batch in images.split(batch_size):
            batch = data.global_norm(data.pad32(batch), mean, std)
            if taps is not None:
                batch = data.local_norm(batch, taps)
            try:
                scores = model(batch.to(device, dtype))
            except Exception as error:  # whatever a network from a file stumbles over
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(
                    f"{saved.path}: the network fails on images of 1x32x32: {reason}"
                ) from None
            if scores.dim() != 2 or len(scores) != len(batch):
                raise ValueError(
                    f"{saved.path}: the network must give one row of scores per image, "
                    f"got shape {tuple(scores.shape)} for {len(batch)} images"
                )
            if bad := int(scores.isnan().any(1).sum()):
                raise ValueError(
                    f"{saved.path}: the network's scores are NaN for {bad} of {len(batch)} images"
                )
            predictions.append(training.predicted_classes(scores).cpu())
    return torch.cat(predictions)


def write_predictions(
    path: str | os.PathLike[str], predictions: Tensor, labels: str = "classes"
) -> None:
    """Write ``Id,Prediction`` lines, atomically: the whole file or none.

    Args:
        path: of the CSV file.
        predictions: digits, ``(N,)``. The images' Ids count from 1.
        labels: ``"classes"`` writes digit + 1, as Torch7 and the reports count classes;
            ``"digits"`` the digits themselves.

    Raises:
        ValueError: for other ``labels``, or a path that is a device, a pipe or a folder: the new
            file would take its place.
        OSError: if the file cannot be written.
    """
    if labels not in LABELS:
        raise ValueError(f"write_predictions: labels must be 'classes' or 'digits', got {labels!r}")
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"write_predictions: {path} is not a regular file")
    values = predictions + 1 if labels == "classes" else predictions
    lines = ["Id,Prediction", *(f"{i},{value}" for i, value in enumerate(values.tolist(), 1))]
    training.write_text(path, "\n".join(lines) + "\n")
