"""``reproduce``: the experiments of both reports, as ``examples/reproduce.py`` says."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from .. import training
from ..mnist import data
from . import command_line, derivations, experiments, pages, plan, records, runner, storage, tables
from .reports import counted

# What needs no training: every run of this script makes the two of them.
EXTRAS = {
    "derivations": (
        "sections 1 and 2",
        "each line of the derivations against autograd and kernels",
    ),
    "gallery": (
        "report 1, section 3.2",
        "what each normalization does to the digits: figures/normalization.png",
    ),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line; anything wrong there ends in one line."""
    p = command_line.parser("Run the experiments of both reports.")
    what = p.add_argument_group("what to run (any of these, together)")
    what.add_argument("--list", action="store_true", help="list every experiment and stop")
    what.add_argument("--experiment", nargs="+", default=[], metavar="NAME")
    what.add_argument("--table", nargs="+", default=[], choices=list(experiments.TABLES))
    what.add_argument("--report", choices=["1", "2", "all"], help="every experiment of a report")
    what.add_argument(
        "--candidates",
        nargs="+",
        default=[],
        choices=list(experiments.CANDIDATES),
        help="guesses at the configuration behind a printed column",
    )
    what.add_argument("--plan", choices=plan.NAMES, help="all that the reports need, in order")
    how = p.add_argument_group("how")
    many = command_line.whole_number(1, 10_000)
    how.add_argument("--seeds", type=many, default=1, help="run with seeds 1 to SEEDS")
    how.add_argument("--epochs", type=many, help="default: as many as the report shows")
    how.add_argument(
        "--minutes", type=command_line.COUNT, help="of a plan: start no epoch that would end later"
    )
    how.add_argument(
        "--results",
        type=Path,
        help="of a plan: where its runs are merged into; the committed ones in a checkout",
    )
    how.add_argument("--dtype", choices=["float64", "float32"], help="default: float64")
    how.add_argument(
        "--perturb",
        type=command_line.whole_number(0, 10_000),
        default=0,
        metavar="N",
        help="N runs more, each with another weight changed by 1e-15",
    )
    how.add_argument("--jobs", type=many, default=1, help="runs at once, sharing the cores")
    how.add_argument(
        "--together",
        type=many,
        default=1,
        metavar="N",
        help="up to N runs of one network make their steps together on a GPU, as one of --jobs",
    )
    how.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    how.add_argument("--resume", action="store_true", help="continue what is in --out")
    how.add_argument("--no-run", action="store_true", help="only tables and report of --out's runs")
    how.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    command_line.add(how, "--data", "--limit", "--device", "--no-progress")
    args = p.parse_args()
    others = args.experiment or args.table or args.report or args.candidates
    if not (args.list or others or args.plan):
        p.error("nothing to run: --list shows the names for --experiment; or --table, --report")
    if args.plan and others:
        p.error("--plan has runs of its own: give it without --experiment, --table, --report")
    if args.minutes is not None and not args.plan:
        p.error("--minutes needs --plan")
    checkout = command_line.repository()
    if args.plan and args.results is None:
        if checkout is None:
            p.error("--plan needs --results, a file: this package is in no checkout")
        args.results = checkout / "benchmarks" / "results" / "reproduction" / "results.json"
    return args


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Data and device, as :class:`runner.Task` has them."""
    root = None if args.data is None else str(args.data)
    return {"limit": args.limit, "device": args.device, "root": root}


def choose(args: argparse.Namespace) -> list[runner.Task]:
    """The runs that the command line asks for, each once."""
    everything = experiments.EXPERIMENTS.values()
    chosen = experiments.select([name for name in args.experiment if name not in EXTRAS])
    if args.report:
        wanted = "report" if args.report == "all" else f"report {args.report}"
        chosen += [e for e in everything if e.section.startswith(wanted)]
    for column in args.candidates:
        chosen += experiments.CANDIDATES[column]
    options = given(args) | {"seeds": args.seeds, "dtype": args.dtype}
    options["perturbations"] = args.perturb
    found = runner.tasks(chosen, epochs=args.epochs, **options)
    for number in args.table:
        table = experiments.TABLES[number]
        columns = experiments.select(list(table.columns.values()))
        found += runner.tasks(columns, epochs=args.epochs or max(table.epochs), **options)
    # A run that is asked for twice, by two tables perhaps, goes as far as either wants.
    farthest: dict[Path, runner.Task] = {}
    for task in sorted(found, key=lambda task: task.epochs):
        farthest[task.folder(Path())] = task
    return [farthest[folder] for folder in dict.fromkeys(t.folder(Path()) for t in found)]


def show_list() -> None:
    """Every experiment, as a table."""
    width = max(map(len, experiments.EXPERIMENTS))
    for e in experiments.EXPERIMENTS.values():
        print(f"{e.name:{width}s}  {counted(e.epochs, 'epoch'):>10s}  {e.section:24s}  {e.title}")
        if e.note:
            print(f"{'':{width}s}              note: {e.note}")
    for name, (section, title) in EXTRAS.items():
        print(f"{name:{width}s}   no training  {section:24s}  {title}")
    print(f"{'predict':{width}s}   no training  report 2, section 2.0.2   see examples/predict.py")
    for column, guesses in experiments.CANDIDATES.items():
        print(f"\nguesses at {column} (--candidates {column}):")
        for e in guesses:
            print(f"  {e.name}: {e.title}")


def report(args: argparse.Namespace, results: dict) -> list[str]:
    """The check of the derivations and the tables to print."""
    page = pages.Report(1, results, args.out, args.data)
    lines = []
    if "derivations" in args.experiment or args.report:
        lines = ["The reports' derivations of sigmoid (dy/dx) and softmax, evaluated as printed"]
        lines += [f"  {row}" for row in derivations.check()]
    found = [f"\nTable {number}\n\n{page.printed_table(number)}" for number in args.table]
    found += [f"\n{page.candidates(column, column)}" for column in args.candidates]
    if found and (warning := page.warning()):
        found.append(f"\n{warning}")
    lines += found
    if args.perturb:
        lines.append(
            "\nRounding: runs that differ in a weight or in pixels, lowest to highest, images right"
        )
        for row in tables.spread(results):
            lines.append(
                f"  {row['experiment']} ({row['dtype']}), {row['what']}, epoch {row['epoch']}, "
                f"{counted(row['runs'], 'run')}: "
                f"training {row['training_lowest']} to {row['training_highest']}, "
                f"test {row['test_lowest']} to {row['test_highest']}"
            )
    return lines


def make(args: argparse.Namespace, todo: list[runner.Task], **options: Any) -> int:
    """Make the runs, say which of them failed, and return the exit code."""
    # Python says so of what workers had that were told to stop; it is cleared away all the same.
    quiet = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    failures = runner.run_all(
        todo,
        args.out,
        args.jobs,
        progress=False if args.no_progress else None,
        repository=command_line.repository(),
        together=args.together,
        **options,
    )
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def work_through(args: argparse.Namespace) -> int:
    """Make the runs of a plan that there is time for, and merge all that --out holds."""
    steps, options = plan.read(args.plan), given(args)
    deadline = None if args.minutes is None else time.time() + 60.0 * args.minutes
    # What is committed need not be made again.
    changed = storage.merge(args.out, args.results)
    pace = plan.pace(plan.tasks(steps, **options), args.out)
    code = 0
    if not (args.dry_run or args.no_run):
        todo = plan.tasks(steps, pace=pace, **options)
        try:
            code = make(args, todo, resume=True, deadline=deadline, any_device=True)
        finally:
            changed += storage.merge(args.out, args.results)
    if changed or args.no_run:
        pages.write(records.read_results(args.results), args.results.parent, args.data)
    for step, epochs, seconds in plan.left(steps, args.out, **options):
        print(
            f"{counted(epochs, 'epoch'):>12s}, {seconds / 3600:6.1f} core hours left: {step.title}"
        )
    print(f"an epoch takes {pace:.1f} times as long here as on an idle core of the plan's machine")
    print(f"{counted(changed, 'run')} new or longer in {args.results}")
    return code


def run() -> int:
    """Run what was asked for, then report on everything that --out holds."""
    args = parse_arguments()
    if args.list:
        show_list()
        return 0
    if args.plan:
        return work_through(args)
    todo = choose(args)
    if args.dry_run:
        for task in todo:
            print(f"{task.name}: {counted(task.epochs, 'epoch')} of {task.digits_per_epoch} digits")
        print(f"{counted(len(todo), 'run')}, {sum(task.digits for task in todo):,} digits")
        return 0
    try:
        code = make(args, [] if args.no_run else todo, resume=args.resume)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; --resume continues what is in {args.out}") from None
    results = records.read_results(args.out / "results.json")
    # Files before lines: there may be nobody who reads these.
    pages.write(results, args.out, args.data)
    for line in report(args, results):
        print(line)
    print(f"{args.out} holds results.json, and made from it report-1.md, report-2.md, report.html")
    return code


def main() -> int:
    """Run, and turn what can go wrong into one line and an exit code."""
    return command_line.run(run, (data.DataError, runner.RunError, training.CheckpointError))
