"""Run the experiments of both reports and set what comes out beside what was printed.

    python examples/reproduce.py --list
    python examples/reproduce.py --table 3.2 --jobs 2           # three columns, three epochs each
    python examples/reproduce.py --experiment relu mse --seeds 3 --dtype float32
    python examples/reproduce.py --report all --limit 2000 --epochs 1 --seeds 2 --jobs 2
    python examples/reproduce.py --candidates relu               # guesses at an unknown column
    python examples/reproduce.py --plan full --minutes 150 --jobs 2   # all that they need

Results are in --out: results.json, and made from it report-1.md, report-2.md and report.html.
Kill it at any moment; --resume goes on after the last complete epoch of each run. What --out holds
must have been made with the same settings, limit, data and kind of device; of epochs it may hold
more than are asked for, or fewer.

--plan works through mnist_ops/lab/plan.json in the order of what its steps decide and starts no
epoch that would not end in time. It goes on where the last call ended, however that one ended, and
puts all that --out holds into --results, the committed ones unless given, and makes the pages
beside them again: a run that is there with more epochs stays. With --dry-run it says how many hours
are left, with --no-run it only merges.
"""

import sys

try:
    from mnist_ops.lab.reproduce_command import main
except ImportError as error:  # the extra is not installed, or no library compiled
    sys.exit(f"error: {error}")

if __name__ == "__main__":
    sys.exit(main())
