"""``predict``: what a saved network sees in images, as ``examples/predict.py`` says."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import training
from ..mnist import data
from . import command_line, prediction


def parse_arguments() -> argparse.Namespace:
    """Read the command line; anything wrong there ends in one line."""
    p = command_line.parser("Predict the digits in images with a saved network.")
    p.add_argument(
        "--model", type=Path, required=True, help="checkpoint.pt, model.pt or Torch7's .net file"
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="28x28 uint8: an idx file (or .gz), .pt, .npy")
    source.add_argument("--split", choices=["test", "train"], help="of MNIST")
    p.add_argument("--out", type=Path, default=Path("predictions.csv"), help="default: %(default)s")
    p.add_argument("--labels", choices=prediction.LABELS, default="classes", help="see above")
    p.add_argument(
        "--normalization",
        metavar="none|contrastive|contrastiveN",
        help="global only, or also local with 7 or N taps; default: what the checkpoint records. "
        "A .net file records nothing: contrastive for report 1, none for report 2",
    )
    p.add_argument("--batch-size", type=command_line.COUNT, default=100)
    command_line.add(p, "--data", "--device", "--threads")
    args = p.parse_args()
    try:
        if args.normalization is not None:
            prediction.kernel_of(args.normalization)
    except ValueError as error:
        p.error(f"--{error}")
    return args


def run(args: argparse.Namespace) -> None:
    """Predict, write the file and, where the labels are known, count."""
    if args.threads:
        torch.set_num_threads(args.threads)
    saved = prediction.load_model(args.model)
    labels = None
    if args.split is not None:
        images, labels = data.load(args.split, args.data)
    else:
        images = prediction.read_images(args.images)
    predictions = prediction.predict(
        saved, images, args.normalization, args.data, args.batch_size, args.device
    )
    prediction.write_predictions(args.out, predictions, args.labels)
    print(f"{args.out} holds {len(predictions)} predictions")
    if labels is not None:
        right = int((predictions == labels).sum())
        share = 100.0 * right / len(labels)
        print(f"{args.split}: {share:.2f} % right, {right} of {len(labels)}")


def main() -> int:
    """Run, and turn what can go wrong into one line and an exit code."""
    expected = data.DataError, training.CheckpointError
    return command_line.run(lambda: run(parse_arguments()), expected)
