"""A run whose activations are planted."""

from tests.probes.conftest import build_run, planted

__all__ = ["build_run", "planted"]
