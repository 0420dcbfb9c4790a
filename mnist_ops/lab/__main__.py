"""``python -m mnist_ops.lab COMMAND ...``: what the scripts in ``examples`` do, as commands."""

import importlib
import sys

COMMANDS = {
    "train": "train the original network of report 1",
    "reproduce": "run the experiments of both reports and compare them with print",
    "predict": "what a saved network sees in images, as Id,Prediction lines",
}


def main() -> int:
    """Hand the command line to the command that it names."""
    name, *rest = sys.argv[1:] or [""]
    if name in COMMANDS:
        sys.argv = [f"mnist_ops.lab {name}", *rest]
        return int(importlib.import_module(f".{name}_command", __package__).main())
    asked = name in ("-h", "--help")
    lines = ["usage: python -m mnist_ops.lab COMMAND ...  (COMMAND --help says more)"]
    lines += [f"  {command:10s} {words}" for command, words in COMMANDS.items()]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
