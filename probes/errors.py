"""What can be wrong with data that is to be probed."""

from roentgen.errors import RoentgenError


class ProbeDataError(RoentgenError):
    """There is no data to probe; the message says what is missing and what to do."""


class NoConvergenceError(ProbeDataError, RuntimeError):
    """A fit does not settle; the message says what to do."""


class OneClassError(RoentgenError):
    """A label does not vary enough to be probed; the message says what it has and what to do."""
