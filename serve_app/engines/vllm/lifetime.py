"""Ends vLLM's processes when the replica that started them ends.

vLLM ends its processes when it is asked to. A replica that is killed cannot ask, and its GPU would stay in use forever. So
every worker watches the replica's process, whose id is in its environment. Without its worker, vLLM's core ends too.
"""

import os
import select
import threading

REPLICA = "ROENTGEN_REPLICA_PID"


def export_replica_pid() -> None:
    """Put this process's id into the environment of the processes that it starts."""
    os.environ[REPLICA] = str(os.getpid())


class ExitsWithReplica:
    """Mixin for a vLLM worker class."""

    def init_device(self) -> None:
        """Watch the replica's process, and initialize the device."""
        watched = os.pidfd_open(int(os.environ[REPLICA]))
        threading.Thread(target=_end_with, args=(watched,), name="exit-with-replica", daemon=True).start()
        super().init_device()  # type: ignore[misc]


def _end_with(process: int) -> None:
    select.select([process], [], [])  # readable when the process has ended
    os._exit(1)
