"""A run with planted activations."""

from tests.probes.conftest import build_run, planted

__all__ = ["build_run", "planted"]
