"""Connects this process to Ray: to one that it starts here, or to a cluster at an address that someone names.

Never `address="auto"`: beside SkyPilot's own Ray it finds the wrong one. Whoever reaches Ray's ports can run code, and on Linux
Ray listens on every interface: a Ray started here is locked with a token, as Ray does by itself since 2.60 for a cluster that
`ray.init` starts (it keeps the token in `~/.ray/auth_token`; `RAY_AUTH_MODE=disabled` turns that off).
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOCAL = "local"
CONNECT_TIMEOUT_S = 5.0


class ClusterError(Exception):
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


@contextmanager
def connected(
    address: str | None, *, verbose: bool = False, starting: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Connect to Ray, unless this process is connected already; on leaving, undo what was done here.

    Args:
        address: `local` starts one here, `HOST:PORT` joins a cluster; None means the one Ray names inside a job, or local.
        verbose: show what tasks and Ray's own processes log.
        starting: told what is done, if this process is not connected yet.

    Raises:
        ClusterError: if no cluster answers, or Ray does not start here.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or LOCAL
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
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Knock at the cluster's door; Ray itself would keep trying for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(f"--ray-address: no Ray cluster answers at {address} ({error})") from error
