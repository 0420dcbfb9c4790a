"""The version, in one place: setup.py, the package and build_info() read it from here."""

__version__ = "0.1.0"
