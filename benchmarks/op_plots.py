"""Tables and figures from what bench_ops.py wrote.

    python benchmarks/op_plots.py ops.json DIR

leaves DIR/ops.md and, for every operator with sizes to compare, DIR/ops-<operator>.png: time
against the elements of the input on logarithmic axes, forward above backward, float32; ours, eager,
compiled, and the time in which a large copy of the same run would move the bytes that must move.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from op_record import RECORD, table

from mnist_ops.lab import command_line, records
from mnist_ops.lab.figures import STYLE

#: Okabe and Ito's colours, which people with any colour vision tell apart, and markers.
STYLES = {
    "mnist_ops": ("#0072B2", "o", "-"),
    "eager": ("#D55E00", "s", "-"),
    "compile": ("#009E73", "^", "-"),
}
FLOOR = "#000000"
DIRECTIONS = ("forward", "backward")


def points(record: dict[str, Any], family: str, direction: str) -> list[dict[str, Any]]:
    """The rows of one curve, by size."""
    rows = [
        row
        for row in record["rows"]
        if (row["family"], row["direction"], row["dtype"]) == (family, direction, "float32")
        and row["sweep"]
    ]
    return sorted(rows, key=lambda row: row["elements"])


def figure(record: dict[str, Any], family: str, path: Path) -> None:
    """Draw one operator."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        drawing = Figure(figsize=(3.5, 4.6), layout="constrained")
        axes = drawing.subplots(2, 1, sharex=True)
        for axis, direction in zip(axes, DIRECTIONS, strict=True):
            rows = points(record, family, direction)
            for name, (color, marker, line) in STYLES.items():
                at = [(row["elements"], row["us"][name]) for row in rows if row["us"].get(name)]
                if at:
                    axis.plot(
                        *zip(*at, strict=True),
                        line,
                        color=color,
                        marker=marker,
                        markersize=4,
                        lw=1.3,
                        label=name,
                    )
            floor = [(row["elements"], row["floor_us"]) for row in rows]
            axis.plot(
                *zip(*floor, strict=True), ":", color=FLOOR, lw=1.3, label="bytes at copy speed"
            )
            axis.set(xscale="log", yscale="log", ylabel="time (µs)", title=direction)
        axes[1].set_xlabel("elements of the input")
        handles, labels = axes[0].get_legend_handles_labels()
        machine = record["machine"]
        case = next(row["case"] for row in record["rows"] if row["family"] == family)
        threads = f", {machine['threads']} thread(s)" if machine["device"] == "cpu" else ""
        drawing.suptitle(f"{case}, float32\n{machine['name']}{threads}", fontsize=9)
        drawing.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        drawing.savefig(path, dpi=200)


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the table and the figures; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "ops.md"]
    written[0].write_text(table(record), encoding="utf-8")
    for family in dict.fromkeys(row["family"] for row in record["rows"] if row["sweep"]):
        if all(points(record, family, direction) for direction in DIRECTIONS):
            written.append(folder / f"ops-{family}.png")
            figure(record, family, written[-1])
    return written


def main() -> int:
    """Read one file, write the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for path in draw(records.read_json(args.json, RECORD), args.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main, [records.RunError]))
