"""What the extra ``lab`` brings: the operators need torch alone, the rooms above them need more."""

from __future__ import annotations

from importlib.util import find_spec


def need(room: str, *modules: str) -> None:
    """Raise an ImportError of one line unless all of these can be imported."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(f"{room} needs {', '.join(missing)}: pip install 'mnist_ops[lab]'")
