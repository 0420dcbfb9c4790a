"""Some hundred of the damaged files of fuzz_files.py, and that it would notice."""

import subprocess
import sys

import fuzz_files
import pytest


def test_damaged_files():
    """Every reader: what is in the file, or its own error, within a limit of memory."""
    outcomes = fuzz_files.run(400)
    assert outcomes.pop("MiB") < 300
    assert sum(outcomes.values()) == 400
    for reader, error in [
        ("load", "Torch7FileError"),
        ("load_net", "Torch7FileError"),
        ("load_model", "CheckpointError"),
        ("read_images", "DataError"),
    ]:
        assert outcomes[f"{reader}: {error}"] > 10, outcomes
        assert outcomes[f"{reader}: read"] > 0, outcomes


@pytest.mark.parametrize(
    "harm", ["raise TypeError", "bytearray(2**31)", "import os; os.abort()"], ids=str
)
def test_harm_is_noticed(harm):
    code = (
        "import fuzz_files\n"
        "from mnist_ops.torch7 import files as torch7_files\n"
        f"def load(path):\n    {harm}\n"
        "fuzz_files.torch7_files.load = load\n"
        "fuzz_files.worker(30, 0)\n"
    )
    path = f"import sys\nsys.path[:0] = {sys.path!r}\n"
    result = subprocess.run([sys.executable, "-c", path + code], capture_output=True, timeout=120)
    assert result.returncode != 0
