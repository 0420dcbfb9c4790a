"""How the package is laid out, by its imports: rooms one above the other, torch alone below."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import mnist_ops

PACKAGE = Path(mnist_ops.__file__).parent
NAME = PACKAGE.name
# Nothing imports from a room above its own. At the bottom are the modules beside the rooms whose
# names begin with an underscore.
ROOMS = ("_", "ops", "nn", "onnx", "torch7", "mnist", "training", "lab")
# What each room may import from outside the standard library; what those below it may, too.
OUTSIDE = {
    "_": {"torch"},
    "onnx": {"onnx_ir", "onnxscript"},
    "torch7": {"numpy"},
    "training": {"filelock", "tqdm"},
    "lab": {"jinja2", "joblib", "matplotlib", "scipy", "torchvision"},
}
EXTRA = set().union(*OUTSIDE.values()) - {"torch", "numpy"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below the package, as a tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        *folders, last = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(folders if last == "__init__" else [*folders, last])
        found[name] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> tuple[set[str], set[str]]:
    """The package's modules that a module imports, wherever in it, and all other packages."""
    inside, outside = set(), set()
    is_package = any(other.startswith(f"{name}.") for other in known) or not name
    here = name.split(".") if is_package and name else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - (node.level - 1)]
            base += node.module.split(".") if node.module else []
            for alias in node.names:  # a module, or something in the module named before it
                one = ".".join([*base, alias.name])
                inside.add(one if one in known else ".".join(base))
    return inside - {name}, outside - set(sys.stdlib_module_names) - {"__future__"}


def room(name: str) -> int:
    first = name.split(".")[0]
    return ROOMS.index("_" if first.startswith("_") else first)


TREES = modules()
IMPORTS = {name: imports(name, tree, set(TREES)) for name, tree in TREES.items()}


def test_every_module_is_in_a_room():
    assert len(TREES) > 30 and {"", "nn", "ops._common", "lab"} <= set(TREES)
    assert {room(name) for name in TREES if name} == set(range(len(ROOMS)))


def test_nothing_imports_upward():
    upward = [
        f"{name or NAME} imports {other or NAME}"
        for name, (inside, _) in IMPORTS.items()
        for other in sorted(inside)
        if name and (not other or room(other) > room(name))
    ]
    assert upward == []


def test_no_circle():
    """Not even of imports within functions; static_order raises a CycleError that names it."""
    order = list(graphlib.TopologicalSorter({k: v for k, (v, _) in IMPORTS.items()}).static_order())
    assert order.index("ops.lp_pool") < order.index("nn") < order.index("lab.experiments")


def test_each_room_needs_no_more_than_it_says():
    allowed: set[str] = set()
    for number, name in enumerate(ROOMS):
        allowed |= OUTSIDE.get(name, set())
        needed = {m: IMPORTS[m][1] - allowed for m in TREES if m and room(m) == number}
        assert {m: more for m, more in needed.items() if more} == {}


def test_import_loads_torch_alone():
    """In a process of its own, and what torch itself has loaded does not count."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import mnist_ops\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    new = set(result.stdout.split())
    assert NAME in new, result.stderr
    assert not new & EXTRA
    assert new - {NAME, "torch", "torchgen"} <= set(sys.stdlib_module_names)


def test_nothing_is_said_twice():
    """No ten lines of code in two places, but for imports; docstrings and comments do not count."""
    places: dict[tuple[str, ...], str] = {}
    twice = []
    folders = [PACKAGE, *(PACKAGE.parent / name for name in ("benchmarks", "examples"))]
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [
                    one
                    for one in body
                    if not isinstance(one, (ast.Import, ast.ImportFrom))
                    and not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
                ] or [ast.Pass()]
        lines = ast.unparse(tree).splitlines()
        for start in range(len(lines) - 9):
            ten = tuple(line.strip() for line in lines[start : start + 10])
            here = f"{path.name}: {ten[0]}"
            if places.setdefault(ten, here) != here:
                twice.append((places[ten], here))
    assert len(places) > 3000 and twice == []
