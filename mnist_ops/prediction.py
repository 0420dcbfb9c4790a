"""Predictions of a saved network: what the assignment's result script does.

::

    >>> saved = prediction.load_model("runs/original/checkpoint.pt")     # or Torch7's model.net
    >>> images, labels = data.load("test")
    >>> predictions = prediction.predict(saved, images)
    >>> prediction.write_predictions("predictions.csv", predictions)
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import data, models, torch7_files, training

__all__ = [
    "SavedModel",
    "kernel_of",
    "load_model",
    "predict",
    "read_images",
    "write_predictions",
]

LABELS = ("classes", "digits")

_ZIP, _GZIP, _NPY = b"PK\x03\x04", b"\x1f\x8b", b"\x93NUMPY"


@dataclass(frozen=True)
class SavedModel:
    """A network that was read from a file, and how the images for it are prepared.

    Attributes:
        model: in evaluation mode.
        path: where it came from.
        normalization: ``"none"``, ``"contrastive"`` or ``"contrastive15"``, see :func:`kernel_of`;
            ``None`` where the file does not say.
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
    """A network from a checkpoint of :func:`mnist_ops.training.fit` or a file of Torch7.

    Which of the two it is is told by the content. Nothing in it is executed.

    Args:
        path: ``checkpoint.pt``, whose ``settings`` may hold ``network`` (the keyword arguments of
            :func:`mnist_ops.models.convnet`; without it, the original network), ``normalization``,
            ``data_kernel``, ``mean`` and ``std``; or a ``.net`` file, see
            :func:`mnist_ops.torch7.load_net`, for which the reports' normalization is assumed.

    Raises:
        CheckpointError, Torch7FileError: if the file is missing, damaged or something else.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise training.CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if torch7_files.is_torch7(head):
        return SavedModel(torch7_files.load_net(path), path, "contrastive")
    if not head.startswith(_ZIP):
        raise training.CheckpointError(
            f"{path} is neither a checkpoint of mnist_ops nor a network of Torch7"
        )
    state = training.load_checkpoint(path)
    settings, weights = state.get("settings"), state.get("model")
    if not isinstance(settings, dict) or not isinstance(weights, dict) or not weights:
        raise training.CheckpointError(f"{path} is a checkpoint without settings or network")
    options = settings.get("network") or {}
    try:
        dtype = next(iter(weights.values())).dtype
        model = models.convnet(**{**options, "dtype": dtype, "device": "cpu"})
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise training.CheckpointError(
            f"{path} does not fit the network that its settings describe: {reason}"
        ) from None
    statistics = None
    if isinstance(settings.get("mean"), float) and isinstance(settings.get("std"), float):
        statistics = settings["mean"], settings["std"]
    return SavedModel(model.eval(), path, _recorded(settings), statistics)


def _recorded(settings: dict[str, Any]) -> str | None:
    """The normalization that a run's settings describe."""
    if "normalization" not in settings:
        return None
    name = str(settings["normalization"] or "none")
    kernel = settings.get("data_kernel")
    return f"{name}{kernel}" if name == "contrastive" and kernel is not None else name


def read_images(path: str | os.PathLike[str]) -> Tensor:
    """Images of 28×28 pixels, uint8 ``(N, 1, 28, 28)``, N >= 1.

    Args:
        path: an idx file as MNIST's, packed with gzip or not; or ``(N, 28, 28)`` or
            ``(N, 1, 28, 28)`` uint8 as a tensor (``torch.save``) or an array (``numpy.save``). What
            it is is told by the content. Nothing in it is executed.

    Raises:
        DataError: if the file is missing, damaged or something else.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise data.DataError(f"{path} is truncated or damaged: {error}.") from None
    except OSError as error:
        raise data.DataError(f"{path} cannot be read: {error.strerror}.") from None
    if content.startswith((_ZIP, _NPY)):
        images = _read_array(path, content.startswith(_ZIP))
        if images.dim() == 4 and images.shape[1] == 1:
            images = images.squeeze(1)
        if images.dtype != torch.uint8 or images.dim() != 3 or images.shape[1:] != (28, 28):
            raise data.DataError(
                f"{path} must hold uint8 images of shape (N, 28, 28), "
                f"got {images.dtype} of shape {tuple(images.shape)}."
            )
        if len(images) == 0:
            raise data.DataError(f"{path} holds no images.")
        return images.unsqueeze(1)
    count = data._check_idx(path, content, len(content), images=True)
    return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(count, 1, 28, 28)


def _read_array(path: Path, is_torch: bool) -> Tensor:
    try:
        if is_torch:
            images = torch.load(path, map_location="cpu", weights_only=True)
        else:
            # Mapped, so that a header's announcement is checked against the file's length.
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            images = torch.from_numpy(np.array(mapped))
    except Exception:  # whatever the bytes make the readers stumble over
        raise data.DataError(f"{path} is damaged or does not hold an array of images.") from None
    if not isinstance(images, Tensor):
        raise data.DataError(f"{path} must hold one tensor, got {type(images).__name__}.")
    return images.contiguous()


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
        DataError: as for :func:`mnist_ops.data.load`.
    """
    if batch_size < 1:
        raise ValueError(f"predict: batch_size must be >= 1, got {batch_size}")
    normalization = normalization or saved.normalization
    if normalization is None:
        raise ValueError(
            f"predict: {saved.path} does not record how its images were normalised; say which "
            "normalization"
        )
    taps = kernel_of(normalization)
    mean, std = saved.statistics or data.global_statistics(data.load("train", root)[0])
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
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{saved.path}: the network fails on images of 1x32x32: {reason}"
                ) from None
            if scores.dim() != 2 or len(scores) != len(batch):
                raise ValueError(
                    f"{saved.path}: the network must give one row of scores per image, "
                    f"got shape {tuple(scores.shape)} for {len(batch)} images"
                )
            predictions.append(training._predict(scores).cpu())
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
        ValueError: for other ``labels``.
        OSError: if the file cannot be written.
    """
    if labels not in LABELS:
        raise ValueError(f"write_predictions: labels must be 'classes' or 'digits', got {labels!r}")
    values = predictions + 1 if labels == "classes" else predictions
    lines = ["Id,Prediction", *(f"{i},{value}" for i, value in enumerate(values.tolist(), 1))]
    training.write_text(path, "\n".join(lines) + "\n")
