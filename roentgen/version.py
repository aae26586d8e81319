"""The package's version, which files and replies record."""

__version__ = "0.1.0"
