"""Errors of probe training."""

from roentgen.errors import RoentgenError


class ProbeDataError(RoentgenError):
    """The data cannot be probed; the message says what is missing and what to do."""


class NoConvergenceError(ProbeDataError, RuntimeError):
    """A fit does not converge; the message says what to do."""


class OneClassError(RoentgenError):
    """The label does not vary enough; the message says which values it has and what to do."""
