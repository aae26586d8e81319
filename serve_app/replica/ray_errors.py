"""Classifies the errors that Ray raises when a replica is called.

A server without Ray Serve (`in_process`) does not import Ray, which takes half a second, and sees none of these errors.
"""

import sys
from typing import Literal

Kind = Literal["busy", "cancelled", "lost", "absent", "failed"]


def kind_of(error: Exception) -> Kind | None:
    """Return what happened to a replica that was called, or None for an error that is not Ray's.

    Returns:
        "busy" if too many requests wait; "cancelled" if the client has left, and what its request asked for was cancelled
        before the request itself; "lost" if the replica's process is gone; "absent" if there is none; "failed" if the replica's
        code has raised an error, also one that says that something it uses has died.
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
