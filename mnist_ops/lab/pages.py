"""The results as pages: ``report-1.md``, ``report-2.md`` and both in one ``report.html``.

The words are in ``report-1.md.jinja`` and ``report-2.md.jinja``, the numbers come from here. The
HTML is made from the Markdown; it needs no network and no scripts and holds its figures. The same
results give the same bytes. ::

    >>> from mnist_ops.lab import pages, records
    >>> pages.write(records.read_results(Path("runs/reproduce/results.json")), "runs/reproduce")
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..training import write_atomically, write_text
from . import derivations, experiments, figures, markdown, records, reports, statistics, tables
from .reports import counted, cut
from .statistics import Run, Sample

__all__ = ["Report", "write"]

_FOLDER = "figures"
_SHOWN_MISTAKES = 12
_SHOWN_EPOCHS = 6
#: Report 2's figures for its batch sizes, in %.
_SIZES = {32: 78.0, 64: 60.0, 128: 45.0}
#: Its data sets, and the experiments by their sizes.
_SETS = {
    "all of MNIST": "batch-{}",
    "small set": "small-batch-{}",
    "small set, local normalization": "small-batch-{}-local",
}
_ALL = "rotation-noise-dropout-convolution"
_NAMES = {"original": "the original network", "three-layer": "three layers"}


# --- Numbers -----------------------------------------------------------------------------------


def _cut(value: float | None) -> str:
    return "–" if value is None else cut(value)


def _spread(sample: Sample | None) -> str:
    """``96.67 ± 0.07 (5)``: mean, standard deviation and count of seeds."""
    if sample is None or sample.n < 2:
        return "–"
    return f"{sample.mean:.2f} ± {sample.sd:.2f} ({sample.n})"


def _mean(values: Sequence[float]) -> str:
    sample = statistics.mean_sd(values)
    return _spread(sample) if sample.n > 1 else cut(sample.mean)


def _named(run: Run) -> str:
    name = records.folder(Path(), run).as_posix().removeprefix("runs/")
    return f"`{name}` at commit {str(run.get('commit') or 'unknown')[:7]}"


class Report:
    """Parts of a page, as Markdown: what the templates call."""

    def __init__(self, number: int, results: Mapping[str, Any], folder: Path, root: Any) -> None:
        self.number, self.results, self.folder, self.root = number, results, folder, root
        self.source = reports.SOURCES[str(number)]
        self.runs = statistics.usable(results["runs"])
        self.images: dict[str, bytes] = {}

    @functools.cached_property
    def verdicts(self) -> list[statistics.Verdict]:
        """What the runs say about the report's claims."""
        claims = [claim for claim in reports.CLAIMS.values() if claim.report == self.number]
        return statistics.verdicts(claims, self.runs)

    def of(self, name: str, reach: int = 1) -> list[Run]:
        """An experiment's runs that reach an epoch, one a seed."""
        return list(statistics.by_seed(self.runs, name, reach).values())

    def figure(self, name: str, words: str, figure: Any) -> str:
        """Put a figure into the folder; ``words`` say what it shows."""
        path = f"{_FOLDER}/{name}.png"
        content = self.images[path] = figures.render(figure)
        (self.folder / _FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / path, lambda file: file.write(content))
        return f"![{words}]({path})\n\n*{words}*"

    # What both pages have.

    def warning(self) -> str:
        """For runs that are no full runs."""
        if all(map(records.of_mnist, self.runs)):
            return ""
        limit = self.runs[0]["limit"]
        part = f"the first {limit:,} images of each split" if limit else "other data"
        return (
            f"**These runs used {part}, not all of MNIST: their accuracies are not those of the "
            "report, and no difference from a printed number means anything.**"
        )

    def counts(self) -> str:
        """How many statements have which outcome."""
        found = [(o, sum(v.outcome == o for v in self.verdicts)) for o in statistics.OUTCOMES]
        told = ", ".join(f"{count} {outcome}" for outcome, count in found if count)
        return f"Of {len(self.verdicts)} statements in the text: {told}."

    def claims(self, section: str) -> str:
        """The report's sentences in a section, each with its verdict."""
        return markdown.items(
            f"“{v.claim.quote}” **{v.outcome.capitalize()}**: {v.sentence}."
            + (f" ({v.claim.note})" if v.claim.note and v.claim.kind != "none" else "")
            for v in self.verdicts
            if v.claim.section.startswith(section)
        )

    def derivations(self) -> str:
        """Each printed line of the derivations, and whether it is right."""
        rows = [
            [
                r.line.source.split(", ", 1)[1],
                f"`{r.line.printed}`",
                r.outcome,
                r.line.remark or "–",
            ]
            for r in derivations.check()
            if r.line.source.startswith(f"report {self.number}")
        ]
        return (
            "Each printed line was evaluated at random inputs and compared with autograd; b is the "
            "softmax's beta.\n\n"
        ) + markdown.table(["line", "printed", "outcome", "remark"], rows)

    def run_table(self) -> str:
        """Every run with its own commit, machine, torch and dtype."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for run in self.results["runs"]:
            known = experiments.EVERY.get(run["experiment"])
            first = known is not None and known.section.startswith("report 1")
            if run["epochs"] and first == (self.number == 1):
                name, _, commit = _named(run).partition(" at commit ")
                words = f"{name.replace(run['dtype'] + '-', '')}: {len(run['epochs'])}"
                if not statistics.is_current(run):
                    words += " (its experiment has changed since: not used)"
                machine = " ".join(f"{run['device']}: {run.get('machine', 'unknown')}".split())
                key = (commit, str(run.get("torch", "unknown")), run["dtype"], machine)
                groups.setdefault(key, []).append(words)
        count = sum(map(len, groups.values()))
        rows = [(*key, "; ".join(names)) for key, names in groups.items()]
        head = ["commit", "torch", "dtype", "machine", "experiment/seed: epochs"]
        return (
            "Every run with the commit, torch, precision and machine that made it. `results.json` "
            "has all its epochs.\n\n"
        ) + markdown.table(head, rows, f"{counted(count, 'run')} in {counted(len(rows), 'group')}")

    def in_group(self, *names: str) -> dict[str, dict[int, Any]]:
        """The experiments of a group, or of a name, none of them with points."""
        every = experiments.EXPERIMENTS.items()
        return {n: {} for wanted in reversed(names) for n, e in every if wanted in (e.group, n)}

    def group(self, *names: str) -> str:
        """Experiments that the report prints no table of: what they reach."""
        return self.reached(self.in_group(*names))

    def reached(self, names: Iterable[str]) -> str:
        """What experiments reach by the last epoch of most seeds."""
        rows, missing = [], []
        for name in names:
            lengths = sorted((len(run["epochs"]) for run in self.of(name)), reverse=True)
            if not lengths:
                missing.append(f"`{name}`")
                continue
            last = lengths[min(statistics.SEEDS, len(lengths)) - 1]
            values = [
                [statistics.metric(run, metric, first, last) for run in self.of(name, last)]
                for metric, first in (("train", last), ("test", last), ("best test", 1))
            ]
            rows.append([f"`{name}`", str(len(values[0])), str(last), *map(_mean, values)])
        head = ["experiment", "seeds", "epoch", "training %", "test %", "best test % until then"]
        parts = [markdown.table(head, rows), f"Not run: {', '.join(missing)}." * bool(missing)]
        return "\n\n".join(filter(None, parts))

    def figure_of(
        self,
        name: str,
        words: str,
        printed: Mapping[str, Any],
        points: str = "printed",
        columns: Mapping[str, str] | None = None,
        last: int | None = None,
    ) -> str:
        """Curves with points, by labels; ``columns`` names their experiments where they differ."""
        lines = [
            figures.Line(label, statistics.by_seed(self.runs, experiment), printed[label])
            for label, experiment in (columns or {label: label for label in printed}).items()
            if printed[label] or self.of(experiment)
        ]
        return self.figure(name, words, figures.curves(lines, points, last)) if lines else ""

    def brief(self) -> str:
        """The main numbers: printed and ours."""
        rows = self._brief_1() if self.number == 1 else self._brief_2()
        return markdown.table(["what", "printed", "here"], rows)

    # Report 1.

    def _brief_1(self) -> list[list[str]]:
        rows = []
        for table in experiments.TABLES.values():
            for column, cells in tables.compare(table, self.runs).items():
                # The baseline stands beside every table; twice is enough.
                if cells[0].experiment != "original" or table.number in ("3.1", "3.5"):
                    count = counted(sum(cell.printed is not None for cell in cells), "number")
                    told = f"Table {table.number}, {column}"
                    rows.append([told, count, tables.column_verdict(cells)])
        for name, words in _NAMES.items():
            if found := tables.authors_log(self.results, name):
                count = counted(len(reports.AUTHORS_LOGS[name.replace("-", "_")]["test"]), "epoch")
                rows.append([f"Authors' log, {words}", count, self._log_words(found)])
        return rows

    def _log_words(self, found: tables.LogComparison) -> str:
        equal = 2 * found.epochs - sum(map(len, found.apart.values()))
        ours = counted(found.epochs, "epoch")
        return f"{equal} of {2 * found.epochs} numbers equal to the image ({ours} run)"

    def printed_table(self, number: str) -> str:
        """A table of report 1 beside seed 1 and all seeds, and a line a column."""
        return self._beside_print(experiments.TABLES[number])

    def figure_table(self, words: str, lines: Mapping[str, Any]) -> str:
        """The same of the numbers of a figure or a log, epoch by epoch behind their words."""
        table = experiments.Table("", {line: line for line in lines}, lines)
        return self._beside_print(table, f"{words}, epoch by epoch")

    def _beside_print(self, table: experiments.Table, folded: str = "") -> str:
        columns = tables.compare(table, self.runs)
        several = any(c.seeds and c.seeds.n > 1 for cells in columns.values() for c in cells)
        rows, told = [], []
        for column, cells in columns.items():
            pairs = list(zip(cells[::2], cells[1::2], strict=True))
            run = [pair for pair in pairs if pair[0].seeds or pair[1].seeds]
            for pair in run:
                epoch = pair[0].epoch
                number_there = f" (printed {epoch + table.shift})" if table.shift else ""
                row = [column, f"{epoch}{number_there}"]
                for cell in pair:
                    row += [_cut(cell.printed), _cut(cell.ours), tables.signed(cell.images)]
                    row += [_spread(cell.seeds)] * several
                rows.append(row)
            words = f"{column}: **{tables.column_verdict(cells)}**"
            if cells[0].run is not None:
                words += f" (seed 1: {_named(cells[0].run)})"
            missing = len(pairs) - len(run)
            if run and missing:
                words += f"; {missing} of {counted(len(pairs), 'epoch')} not run yet"
            told.append(words)
        parts = ("printed", "seed 1", "images", *["all seeds"] * several)
        head = ["column", "epoch", *(f"{split}: {p}" for split in tables.SPLITS for p in parts)]
        return f"{markdown.table(head, rows, folded)}\n\n{markdown.items(told)}"

    def table_figure(self, number: str) -> str:
        """The curves of a table of report 1 with its numbers as points."""
        table = experiments.TABLES[number]
        words = f"Table {number}. Circles: printed; lines: seed 1; bands: lowest to highest seed."
        name, last = f"table-{number}", max(table.epochs)
        return self.figure_of(name, words, table.printed, "printed", table.columns, last)

    def log_figure(self, name: str, words: str, columns: Mapping[str, str]) -> str:
        """Curves with the authors' logs as points."""
        printed = {}
        for column, experiment in columns.items():
            log = reports.AUTHORS_LOGS[experiment.replace("-", "_")]
            printed[column] = dict(enumerate(zip(log["training"], log["test"], strict=False), 1))
        words += " Lines: seed 1; bands: lowest to highest seed; epoch 1 lies below the panels."
        return self.figure_of(name, words, printed, "authors' log", columns)

    def gallery(self, words: str) -> str:
        """What the normalizations make of the images."""
        from ..mnist import data

        try:
            gallery = figures.normalization_gallery(self.root)
        except (data.DataError, IndexError, ValueError):
            return ""  # Other data than MNIST, or none: the numbers are still there.
        return self.figure("normalization", words, gallery)

    def log(self, name: str) -> str:
        """A run beside the authors' log of it: images, confusion matrices, rounding's reach."""
        found = tables.authors_log(self.results, name)
        words = _NAMES[name].capitalize()
        if found is None:
            return f"**{words}**: not run."
        told = [f"**{words}** ({_named(found.run)}): {self._log_words(found)}."]
        for split, apart in found.apart.items():
            if apart:
                far = sorted(apart, key=lambda epoch: -abs(apart[epoch]))[:_SHOWN_EPOCHS]
                shown = ", ".join(f"{tables.signed(apart[e])} in epoch {e}" for e in sorted(far))
                few = ", the farthest" if len(far) < len(apart) else ""
                told.append(f"{split.capitalize()}, more or fewer right than there{few}: {shown}.")
        for (what, split), (runs, of, outside) in found.inside.items():
            far = sorted(outside, key=lambda epoch: -abs(outside[epoch]))[:_SHOWN_EPOCHS]
            shown = "; ".join(f"{tables.signed(outside[e])} in epoch {e}" for e in sorted(far))
            but = f" ({'farthest ' * (len(far) < len(outside))}outside: {shown})" if far else ""
            told.append(
                f"Rounding: the log lies between the lowest and highest of up to {runs} runs that "
                f"{tables.PERTURBED[what]} in {of - len(outside)} of {of} epochs of {split}{but}."
            )
        for run in self.runs:
            if (run["experiment"], run["seed"]) == (name, 1) and run["dtype"] != found.run["dtype"]:
                both = list(zip(found.run["epochs"], run["epochs"], strict=False))
                keys = tables.SPLITS.values()
                same = sum(cut(a[key]) == cut(b[key]) for a, b in both for key in keys)
                told.append(f"{_named(run)} prints the same {same} of {2 * len(both)} numbers.")
        matrices = tables.confusion_cells(found.run) if name == "original" else {}
        for split, (equal, total, others) in matrices.items():
            shown = "; ".join(["equal", *others[:_SHOWN_EPOCHS]])
            told.append(
                f"Confusion matrices from epoch 20 on, {split}: {equal:,} of {total:,} cells "
                f"{shown}."
            )
        return "\n".join([told[0], "", markdown.items(told[1:])])

    def candidates(self, name: str, words: str) -> str:
        """The guesses at a column, closest first."""
        column = experiments.EXPERIMENTS[name]
        rows = tables.candidates(column, self.runs)
        done = [cells for _, cells in rows if cells]
        hits = sum(all(cell.images == 0 for cell in cells) for cells in done)
        training, test = column.reported[1]
        outcome = f"{hits} print both numbers" if hits else "not found"
        told = (
            f"**{words}, printed {training:.2f} / {test:.2f}: {outcome}** "
            f"({len(done)} of {len(rows)} configurations run)."
        )
        shown = []
        for cells in done:
            numbers = [f"{_cut(c.ours)} ({tables.signed(c.images)})" for c in cells]
            shown.append([cells[0].column, *numbers, _named(cells[0].run)])
        head = ["configuration", "training (images)", "test (images)", "run"]
        nearest, others = shown[:3], shown[3:]
        parts = [told, markdown.table(head, nearest)]
        parts.append(markdown.table(head, others, f"{len(others)} more"))
        missing = "; ".join(guess.title for guess, cells in rows if not cells)
        return "\n\n".join([*parts, f"Not run: {missing}." * bool(missing)])

    def inside(self) -> str:
        """Kernels, confusion matrix and worst mistakes of the original's seed 1."""
        from ..mnist import data

        run = statistics.by_seed(self.runs, "original").get(1)
        if run is None:
            return "The original network was not run."
        parts = [f"{_named(run)}, after {counted(len(run['epochs']), 'epoch')}."]
        if run.get("filters"):
            words = "The first convolution's kernels: blue negative, white zero, red positive."
            parts.append(self.figure("filters", words, figures.filters(run["filters"])))
        words = "Test images by true and predicted class; colour marks the mistakes."
        counts = run["epochs"][-1]["confusion"]
        parts.append(self.figure("confusion", words, figures.confusion(counts)))
        if run.get("mistakes") and (self.root is not None or records.of_mnist(run)):
            try:
                images, _ = data.load("test", self.root)
            except data.DataError:
                return "\n\n".join(parts)  # Without the images there is one picture less.
            items = [m for m in run["mistakes"] if m["index"] < len(images)][:_SHOWN_MISTAKES]
            words = "Wrong and surest of it: true class as predicted class, confidence, index."
            parts.append(self.figure("mistakes", words, figures.mistakes(items, images)))
        return "\n\n".join(parts)

    # Report 2.

    def _brief_2(self) -> list[list[str]]:
        rows = []
        for name, last, printed in (("rotation-0.2", 44, "99.57"), (_ALL, 108, "99.63")):
            best = [statistics.metric(run, "best test", 1, last) for run in self.of(name, last)]
            here = _mean(best) if best else f"not run for {last} epochs yet"
            rows.append([f"`{name}`, best test of {last} epochs", f"{printed} %", here])
        if near := min(self._nearest(), key=lambda row: float(row[-1]), default=None):
            data, split, epoch, *means, _ = near
            here = f"nearest: {' / '.join(means)} ({data}, {split}, epoch {epoch})"
            rows.append(["batch size 32 / 64 / 128", "78 / 60 / 45 %", here])
        if found := self._grid():
            name, nearest = min(found.items(), key=lambda one: abs(float(np.mean(one[1])) - 30))
            here = f"nearest: {np.mean(nearest):.1f} % (`{name}`)"
            rows.append(["momentum and learning rate", "around 30 %", here])
        return rows

    @functools.cached_property
    def _sizes(self) -> dict[tuple[str, str], list[list[float]]]:
        """By data set and split: for each epoch that all runs reach the mean of each size."""
        found = {}
        for words, pattern in _SETS.items():
            chosen = [self.of(pattern.format(size)) for size in _SIZES]
            last = min(min((len(run["epochs"]) for run in runs), default=0) for runs in chosen)
            for split, key in tables.SPLITS.items():
                found[words, split] = [
                    [float(np.mean([run["epochs"][e][key] for run in runs])) for runs in chosen]
                    for e in range(last)
                ]
        return found

    def _nearest(self) -> list[list[str]]:
        """For each data set and split the epoch nearest to all printed figures."""
        rows = []
        for names, means in self._sizes.items():
            printed = list(_SIZES.values())
            far = [max(abs(m - x) for m, x in zip(r, printed, strict=True)) for r in means]
            if far:
                best = far.index(min(far))
                shown = [f"{m:.1f}" for m in (*means[best], far[best])]
                rows.append([*names, f"{best + 1} of {len(far)}", *shown])
        return rows

    def sizes(self) -> str:
        """The batch sizes' nearest epochs."""
        head = ["data", "split", "epoch", *(f"{s} ({x:g} %)" for s, x in _SIZES.items())]
        return markdown.table([*head, "farthest (points)"], self._nearest()) or "Not run."

    def small_sizes(self) -> str:
        """The batch sizes on the small set, epoch by epoch."""
        small = {words: pattern for words, pattern in _SETS.items() if words.startswith("small")}
        columns = [self._sizes[words, split] for words in small for split in tables.SPLITS]
        rows = []
        for e, means in enumerate(zip(*columns, strict=False), 1):
            pairs = [
                pair
                for train, test in zip(means[::2], means[1::2], strict=True)
                for pair in zip(train, test, strict=True)
            ]
            rows.append([str(e), *(f"{train:.0f} / {test:.0f}" for train, test in pairs)])
        head = ["epoch", *(f"`{p.format(size)}`" for p in small.values() for size in _SIZES)]
        return markdown.table(head, rows, "The small set epoch by epoch: training / test in %")

    def _grid(self) -> dict[str, list[float]]:
        """Test accuracy of the momenta and learning rates on the small set."""
        found = {}
        for name in experiments.EXPERIMENTS:
            if name.startswith("small-momentum-") and (runs := self.of(name)):
                last = min(len(run["epochs"]) for run in runs)
                found[name] = [statistics.metric(run, "test", last, last) for run in runs]
        return found

    def momentum_grid(self, words: str) -> str:
        """The same as a table, momenta by learning rates."""
        found = {
            tuple(name.removeprefix("small-momentum-").rsplit("-lr-", 1)): values
            for name, values in self._grid().items()
        }
        rates = list(dict.fromkeys(rate for _, rate in found))
        rows = []
        for momentum in dict.fromkeys(momentum for momentum, _ in found):
            there = [found.get((momentum, rate)) for rate in rates]
            rows.append([momentum.replace("-", ", "), *(_mean(x) if x else "–" for x in there)])
        head = ["momentum", *(f"learning rate {rate}" for rate in rates)]
        return f"{words}\n\n{markdown.table(head, rows)}" if rows else ""

    def beyond(self) -> str:
        """Experiments of neither report, and what they were chosen from."""
        parts = []
        for name, experiment in experiments.EXPERIMENTS.items():
            if not experiment.section.startswith("report"):
                told = "; ".join(filter(None, [experiment.title, experiment.note]))
                parts += [f"`{name}`: {told}.", self.reached([name])]
                last = experiment.epochs
                seeds = [
                    f"{run['seed']}: {cut(statistics.metric(run, 'test', last, last))}"
                    for run in self.of(name, last)
                ]
                if seeds:
                    parts.append(f"Test % of each seed after epoch {last}: {', '.join(seeds)}.")
                if choices := experiments.CHOICES.get(name):
                    parts += [
                        f"It was chosen among these, trained without the last "
                        f"{choices[0].validation:,} training images and tested on them:",
                        markdown.items(f"`{c.name}`: {c.title}" for c in choices),
                        self.reached(c.name for c in choices),
                    ]
        return "\n\n".join(["## Beyond the reports", *parts]) if parts else ""


def write(
    results: Mapping[str, Any],
    folder: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write both pages, the HTML and the figures they show into a folder.

    Args:
        results: as :func:`mnist_ops.lab.records.read_results` gives them. Runs may be unfinished,
            of unequal length, of unknown experiments, or none.
        folder: is made where it does not exist. ``figures/`` in it gets the PNG files.
        root: a folder with other data, see :func:`mnist_ops.mnist.data.load`.

    Returns:
        The paths of ``report-1.md``, ``report-2.md`` and ``report.html``.

    Raises:
        OSError: if the folder cannot be written.
    """
    import jinja2

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    pages, bodies = {}, []
    for number in (1, 2):
        report = Report(number, results, folder, root)
        page = environment.get_template(f"report-{number}.md.jinja").render(
            r=report, starter=reports.SOURCES["starter"], logs=reports.LOGS, figures=reports.FIGURES
        )
        page = re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"
        bodies.append(markdown.to_html(page, report.images))
        pages[folder / f"report-{number}.md"] = page
    page = environment.get_template("report.html.jinja").render(bodies=bodies)
    pages[folder / "report.html"] = page
    for path, page in pages.items():
        write_text(path, page)
    return list(pages)
