"""Experiments of the two reports: their definitions, runs, statistics, figures and pages.

What it needs beside torch comes with ``pip install 'mnist_ops[lab]'``.
"""

from .._extra import need

need(__name__, "jinja2", "joblib", "matplotlib", "scipy")
