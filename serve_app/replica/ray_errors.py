"""Classifies the errors that Ray raises for calls to a replica.

A server without Ray Serve (`in_process`) sees none of these errors, and does not import Ray, which takes half a second.
"""

import sys
from typing import Literal

Kind = Literal["busy", "cancelled", "lost", "absent", "failed"]


def kind_of(error: Exception) -> Kind | None:
    """Classify an error of a call to a replica; None if it is not Ray's.

    Returns:
        "busy": too many requests wait. "cancelled": the client disconnected, and the call was cancelled before the request.
        "lost": the replica's process has died. "absent": there is no replica. "failed": the replica's code raised an error,
        including one about something else that has died.
    """
    if "ray" not in sys.modules:
        return None
    from ray.exceptions import (
        LocalRayletDiedError,
        NodeDiedError,
        ObjectLostError,
        OutOfMemoryError,
        RayActorError,
        RayError,
        RayTaskError,
        RpcError,
        TaskCancelledError,
        WorkerCrashedError,
    )
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    lost = (
        LocalRayletDiedError,
        NodeDiedError,
        ObjectLostError,
        OutOfMemoryError,
        RayActorError,
        RpcError,
        WorkerCrashedError,
    )
    if isinstance(error, BackPressureError):
        return "busy"
    if isinstance(error, TaskCancelledError):
        return "cancelled"
    if isinstance(error, DeploymentUnavailableError):
        return "absent"
    if isinstance(error, lost) and not isinstance(error, RayTaskError):
        return "lost"
    return "failed" if isinstance(error, RayError) else None
