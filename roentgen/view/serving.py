"""Serves the page from this process, on loopback, behind a random token."""

import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from roentgen.defaults import HOST, RESULTS, STORE
from roentgen.http_client import LAST_PORT
from roentgen.view.app import make_app
from roentgen.view.catalog import check_addresses
from roentgen.view.errors import ViewError
from roentgen.view.library import Library


@contextmanager
def viewing(addresses: Sequence[str], *, port: int = 0) -> Iterator[str]:
    """Serve the page until the block ends; yields its address, token included.

    Args:
        addresses: runs, sessions, and folders that hold some; `results` and `activations`, as far as they are there, if none.
        port: 0 chooses a free one.

    Raises:
        ViewError: if nothing is at an address, or the port is none.
        StoreError: if an address cannot be reached.
        OSError: if the port is taken.
    """
    if not 0 <= port <= LAST_PORT:
        raise ViewError(f"--port {port} is no port; allowed are 1 to {LAST_PORT}, or 0 for any free one")
    given = list(addresses) or [name for name in (RESULTS, STORE) if Path(name).is_dir()]
    if not given:
        raise ViewError(
            f"there is no folder {RESULTS} or {STORE} here: name a run, a session, or a folder that holds some"
        )
    if addresses:
        check_addresses(given)
    token = secrets.token_urlsafe(24)
    listening = socket.create_server((HOST, port))
    app = make_app(Library(given), lambda: [token])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="view", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://{HOST}:{listening.getsockname()[1]}/?token={token}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()
