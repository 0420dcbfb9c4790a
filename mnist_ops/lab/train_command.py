"""``train``: the original network of report 1 on MNIST, as ``examples/train_mnist.py`` says."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from .. import torch7, training
from ..mnist import data, models
from ..torch7 import optim
from . import command_line, figures, reports

_COUNT = command_line.COUNT


def parse_arguments() -> argparse.Namespace:
    """Read the command line; anything wrong there ends in one line."""
    p = command_line.parser(
        "Train the original network of report 1 on MNIST.",
        epilog="Without options: the run of Table 3.1, float64, batch size 1, one epoch.",
    )
    p.add_argument(
        "--epochs", type=_COUNT, default=1, help="in all, those before --resume included"
    )
    p.add_argument("--seed", type=int, default=1, help="of Torch7's random numbers")
    p.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    p.add_argument("--batch-size", type=_COUNT, default=1)
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate, default %(default)s")
    p.add_argument("--lr-decay", type=float, default=1e-7, help="lr / (1 + steps * decay)")
    p.add_argument("--momentum", type=float, default=0.0)
    p.add_argument("--dampening", type=float, help="equal to the momentum unless given")
    p.add_argument("--nesterov", action="store_true", help="needs --dampening 0")
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--normalization", choices=["contrastive", "global"], default="contrastive")
    p.add_argument(
        "--out", type=Path, default=Path("runs/train_mnist"), help="default: %(default)s"
    )
    p.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    command_line.add(p, "--data", "--limit", "--device", "--threads", "--no-progress")
    return p.parse_args()


def run() -> int:
    """Train, test and write the results; the exit code is 1 where the run diverged."""
    args = parse_arguments()
    # Of the whole run, the files after training included. A folder that does not exist is made,
    # but not to say that there is nothing in it to resume.
    lock = not args.resume or args.out.is_dir()
    if args.threads:
        torch.set_num_threads(args.threads)
    contrastive = args.normalization == "contrastive"
    generator = torch7.start(args.seed, data_kernel_size=7 if contrastive else None)
    dtype = getattr(torch, args.dtype)
    model = models.convnet(dtype=dtype, device=args.device, generator=generator)
    sgd = optim.SGD(
        model.parameters(),
        lr=args.lr,
        lr_decay=args.lr_decay,
        momentum=args.momentum,
        dampening=args.dampening,
        weight_decay=args.weight_decay,
        nesterov=args.nesterov,
    )
    digits = data.prepare(args.normalization, root=args.data, limit=args.limit)
    print(f"{models.count_parameters(model):,} parameters, normalization {args.normalization}")
    source = data.describe(args.data)
    print(f"trained on {source}")

    with training.locked(args.out) if lock else contextlib.nullcontext():
        history = train(args, model, sgd, digits, generator)
        write(args, model, history, reports.TABLES["3.1"]["original"] if source == "MNIST" else {})
    return 0 if math.isfinite(history[-1].train_loss + history[-1].test_loss) else 1


def train(
    args: argparse.Namespace,
    model: torch.nn.Module,
    sgd: optim.SGD,
    digits: data.Splits,
    generator: torch7.Generator,
) -> list[training.EpochResult]:
    """Train to the last epoch."""
    unchanging = {"epochs", "threads", "data", "out", "resume", "no_progress"}
    settings = {name: value for name, value in vars(args).items() if name not in unchanging}
    return training.fit(
        model,
        (digits.train_images, digits.train_labels),
        (digits.test_images, digits.test_labels),
        epochs=args.epochs,
        optimizer=sgd,
        generator=generator,
        batch_size=args.batch_size,
        folder=args.out,
        resume=args.resume,
        settings=settings | {"mean": digits.mean, "std": digits.std},
        progress=False if args.no_progress else None,
    )


def write(
    args: argparse.Namespace,
    model: torch.nn.Module,
    history: list[training.EpochResult],
    table: Mapping[int, tuple[float, float | None]],
) -> None:
    """Print the results, beside the table that is printed for such data, and write their files."""
    if table:
        print("\n        this run           Table 3.1\nepoch   training    test   training    test")
    else:
        print("\nepoch   training    test")
    for result in history:
        printed = "".join(f"{x:9.2f}" for x in table.get(result.epoch, ()))
        ours = f"{result.train_accuracy:9.2f}{result.test_accuracy:9.2f}"
        print(f"{result.epoch:5d} {ours}  {printed}".rstrip())
    confusion = training.ConfusionMatrix.from_counts(history[-1].confusion)
    print(f"\nTest set after epoch {len(history)}\n{confusion}\n")

    training.write_torch(args.out / "model.pt", model.state_dict())
    confusion.save(args.out / "confusion.csv")
    run = {"epochs": [asdict(result) for result in history]}
    line = figures.Line("this run", {args.seed: run}, table)
    figure = figures.curves([line], "Table 3.1", last=len(history), within=True)
    figures.save(figure, args.out / "accuracy.png")
    print(f"{args.out} holds model.pt, checkpoint.pt, log.csv, confusion.csv and accuracy.png")


def main() -> int:
    """Run, and turn what can go wrong into one line and an exit code."""
    return command_line.run(
        run, [data.DataError, training.CheckpointError, training.FolderInUseError]
    )
