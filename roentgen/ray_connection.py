"""Connects this process to Ray: to one that it starts here, or to a cluster at an address that someone names.

Never `address="auto"`: beside SkyPilot's own Ray it finds the wrong one. Whoever reaches Ray's ports can run code, and on Linux
Ray listens on every interface: a Ray started here is locked with a token, as Ray does by itself since 2.60 for a cluster that
`ray.init` starts (it keeps the token in `~/.ray/auth_token`; `RAY_AUTH_MODE=disabled` turns that off).

Ray has one connection per process. What runs at the same time, in threads or one inside the other, shares it: the last that
leaves ends it.
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
    """Ray does not start here, or cannot be reached at the address given."""


def check_address(address: str) -> str:
    """Return an address of Ray as a person writes it, if it is one.

    Raises:
        ValueError: if it is neither `local` nor HOST:PORT.
    """
    if address == "auto":
        raise ValueError(
            "'auto' takes whatever Ray it finds, which beside SkyPilot's own is often the wrong one; "
            "allowed are local and HOST:PORT"
        )
    host, _, port = address.rpartition(":")
    if address != LOCAL and not (host and port.isascii() and port.isdigit()):
        raise ValueError(f"{address!r} is not an address of Ray; allowed are local and HOST:PORT")
    return address


class _Connection:
    """This process's connection to Ray, and how many use it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0

    @contextmanager
    def used(self, connect: Callable[[], None]) -> Iterator[None]:
        """Connect for the first user, and disconnect after the last; a connection that others made is used and left."""
        import ray

        with self._lock:
            own = self._users > 0 or not ray.is_initialized()
            if own and not ray.is_initialized():
                try:
                    connect()
                except BaseException:  # what Ray has started until then would stay as long as this process
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
    """Connect to Ray, unless this process is connected already; the last to leave undoes what was done here.

    Args:
        address: `local` starts one here, `HOST:PORT` joins a cluster; None means the one Ray names inside a job, or local.
        verbose: show what tasks and Ray's own processes log.
        starting: told what is done, if this process is not connected yet.

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
    except Exception as error:  # a node that does not come up in time is a bare Exception of Ray's
        if where == LOCAL:
            raise ClusterError(
                f"Ray did not start on this machine ({' '.join(str(error).split())}); it waits half a minute, which a busy "
                "machine may not keep: try again, or see Ray's logs in /tmp/ray/session_latest/logs"
            ) from error
        raise ClusterError(
            f"--ray-address: cannot join the Ray cluster at {where} ({error}); "
            "if it is locked with a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error


def _check_reachable(address: str) -> None:
    """Knock at the cluster's door; Ray itself would keep trying for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(f"--ray-address: no Ray cluster answers at {address} ({error})") from error
