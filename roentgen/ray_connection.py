"""Connects this process to Ray: to a cluster that it starts here, or to one at a given address.

`address="auto"` is never used, because it may find SkyPilot's own Ray. Anyone who can reach Ray's ports can run code, and on
Linux Ray listens on every interface. So a Ray started here requires a token. Since 2.60 Ray does this by default for clusters
that `ray.init` starts (the token is in `~/.ray/auth_token`; `RAY_AUTH_MODE=disabled` turns it off).

Ray has one connection per process. Concurrent and nested contexts share it, and the last one to exit closes it.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from roentgen.errors import RoentgenError

LOCAL = "local"
CONNECT_TIMEOUT_S = 5.0


class ClusterError(RoentgenError):
    """Ray does not start here, or cannot be reached at the given address."""


def check_address(address: str) -> str:
    """Check an address of Ray, and return it.

    Raises:
        ValueError: if it is neither `local` nor HOST:PORT.
    """
    if address == "auto":
        raise ValueError(
            "'auto' uses any Ray that it finds, which on a SkyPilot cluster is often the wrong one; "
            "allowed are local and HOST:PORT"
        )
    host, _, port = address.rpartition(":")
    if address != LOCAL and not (host and port.isascii() and port.isdigit()):
        raise ValueError(f"{address!r} is not an address of Ray; allowed are local and HOST:PORT")
    return address


class _Connection:
    """This process's connection to Ray, with its number of users."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0

    @contextmanager
    def used(self, connect: Callable[[], None]) -> Iterator[None]:
        """Connect for the first user, and disconnect after the last; an existing connection is used and kept."""
        import ray

        with self._lock:
            own = self._users > 0 or not ray.is_initialized()
            if own and not ray.is_initialized():
                try:
                    connect()
                except BaseException:  # otherwise, what Ray has started would run as long as this process
                    ray.shutdown()
                    raise
            self._users += own
        try:
            yield
        finally:
            with self._lock:
                self._users -= own
                if own and not self._users:
                    ray.shutdown()


_CONNECTION = _Connection()


@contextmanager
def connected(
    address: str | None, *, verbose: bool = False, starting: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Connect to Ray within a context, unless this process is already connected; the last context to exit disconnects.

    Args:
        address: `local` starts Ray here, `HOST:PORT` joins a cluster; None means `RAY_ADDRESS`, which Ray sets in a job, or
            local.
        verbose: show the logs of tasks and of Ray's processes.
        starting: called with the stage, if this process is not connected yet.

    Raises:
        ClusterError: if no cluster answers, or Ray does not start here.
    """
    with _CONNECTION.used(lambda: _connect(address or os.environ.get("RAY_ADDRESS") or LOCAL, verbose, starting)):
        yield


def _connect(where: str, verbose: bool, starting: Callable[[str], None]) -> None:
    import ray

    starting("starting Ray" if where == LOCAL else f"joining Ray at {where}")
    if where != LOCAL:
        _check_reachable(where)
    options = {"include_dashboard": False} if where == LOCAL else {}
    try:
        ray.init(
            address=where, log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR, **options
        )
    except Exception as error:  # Ray raises a bare Exception if a node does not start in time
        if where == LOCAL:
            raise ClusterError(
                f"Ray did not start on this machine ({' '.join(str(error).split())}); its time limit is half a minute, which a "
                "busy machine may exceed: try again, or see Ray's logs in /tmp/ray/session_latest/logs"
            ) from error
        raise ClusterError(
            f"--ray-address: cannot join the Ray cluster at {where} ({error}); "
            "if it requires a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error


def _check_reachable(address: str) -> None:
    """Check that the port accepts connections; Ray itself would retry for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(f"--ray-address: no Ray cluster answers at {address} ({error})") from error
