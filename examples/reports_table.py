"""A table of report 1 beside our runs: what was printed in 2016, and by how many images we differ.

    python examples/reports_table.py

It trains nothing: the runs are the committed ones, and `reproduce.py --table 3.2` makes them again.
Expected, of Table 3.2, accuracies in % (+24: so many images more than print the same number):

    Gaussian1D(7)     epoch 1: training 96.71 (0), test 99.04 (0)
    Gaussian1D(7)     epoch 2: training 99.04 (0), test 99.41 (0)
    Gaussian1D(7)     epoch 3: training 99.34 (0), test 99.40 (0)
    Gaussian1D(15)    epoch 1: training 96.72 (+24), test 98.88 (+2)
    Gaussian1D(15)    epoch 2: training 99.00 (+15), test 99.11 (+6)
    Gaussian1D(15)    epoch 3: training 99.32 (+5), test 99.28 (−6)
    no normalization  epoch 1: training 96.66 (0), test 98.79 (0)
    no normalization  epoch 2: training 98.99 (0), test 99.14 (0)
    no normalization  epoch 3: training 99.27 (0), test 99.31 (0)
"""

from pathlib import Path

from mnist_ops.lab import experiments, records, statistics, tables

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "reproduction" / "results.json"


def main() -> None:
    """Print the table."""
    runs = statistics.usable(records.read_results(RESULTS)["runs"])
    for column, cells in tables.compare(experiments.TABLES["3.2"], runs).items():
        for training, test in zip(cells[::2], cells[1::2], strict=True):
            told = [
                f"{c.split} {c.printed:.2f} ({tables.signed(c.images)})" for c in (training, test)
            ]
            print(f"{column:17} epoch {training.epoch}: {', '.join(told)}")


if __name__ == "__main__":
    main()
