"""Has vLLM's processes end with the replica that has started them.

vLLM ends them when it is told to. A replica that is killed tells nobody, and its GPU would stay taken for ever: so every worker
watches the replica's process, whose id it has from the environment. Without its worker, vLLM's core ends too.
"""

import os
import select
import threading

REPLICA = "ROENTGEN_REPLICA_PID"


def announce() -> None:
    """Let the processes that this one starts know it."""
    os.environ[REPLICA] = str(os.getpid())


class EndsWithReplica:
    """Mixed into a vLLM worker class."""

    def init_device(self) -> None:
        """Begin to watch, and make the device ready."""
        watched = os.pidfd_open(int(os.environ[REPLICA]))
        threading.Thread(target=_end_with, args=(watched,), name="ends-with-replica", daemon=True).start()
        super().init_device()  # type: ignore[misc]


def _end_with(process: int) -> None:
    select.select([process], [], [])  # a process that has ended can be read from
    os._exit(1)
