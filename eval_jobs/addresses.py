"""One client for a server with several addresses, such as a cluster with one address per node.

Every address reaches every replica of the model; several are needed because a node may be lost together with its address.
Each request goes to the next address in turn, and an unreachable address is skipped for a while. Retries are left to the
SDK: its next attempt uses the next address.

A lost node does not close its connections: packets to it vanish, and a slow reply looks the same. TCP keep-alive therefore
probes a connection after 15 idle seconds and drops it 15 seconds later.
"""

import itertools
import random
import socket
import time
from collections.abc import Sequence

import httpx2

PASSED_BY_S = 30.0

LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=100)

KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):  # macOS names it differently and idles for two hours
    KEEP_ALIVE += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
    ]


def split(base_url: str) -> tuple[str, ...]:
    """Split `http://A:8000/v1,http://B:8000/v1` into addresses.

    Raises:
        ValueError: if one is not an address, or their paths differ.
    """
    urls = tuple(part.strip().rstrip("/") for part in base_url.split(",") if part.strip())
    wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
    if wrong or not urls:
        given = repr(wrong[0] if wrong else base_url)
        raise ValueError(f"{given} is not the address of a server; allowed are http://HOST:PORT/v1 and https://…")
    if len({httpx2.URL(url).path for url in urls}) > 1:
        raise ValueError(f"{base_url!r} are addresses with different paths; one server has one path")
    return urls


class Addresses(httpx2.AsyncBaseTransport):
    """Sends each request to the next of several addresses, starting at a random one because many clients start at once."""

    def __init__(self, urls: Sequence[str], transport: httpx2.AsyncBaseTransport | None = None) -> None:
        """Create the transport.

        Args:
            urls: base addresses with the same path.
            transport: sends the requests; an HTTP transport by default.
        """
        self._urls = [httpx2.URL(url) for url in urls]
        self._turn = itertools.count(random.randrange(len(self._urls)))
        self._passed_by_until = [0.0] * len(self._urls)
        self._transport = transport or httpx2.AsyncHTTPTransport(limits=LIMITS, socket_options=KEEP_ALIVE)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request.

        Raises:
            httpx2.TransportError: if the address cannot be reached or the connection is lost.
        """
        number = self._choose()
        url = self._urls[number]
        request.url = request.url.copy_with(scheme=url.scheme, host=url.host, port=url.port)
        request.headers["Host"] = url.netloc.decode()
        try:
            return await self._transport.handle_async_request(request)
        except (httpx2.NetworkError, httpx2.ConnectTimeout, httpx2.RemoteProtocolError):
            self._passed_by_until[number] = time.monotonic() + PASSED_BY_S
            raise

    def _choose(self) -> int:
        turn = next(self._turn)
        order = [(turn + step) % len(self._urls) for step in range(len(self._urls))]
        now = time.monotonic()
        return next((number for number in order if self._passed_by_until[number] <= now), order[0])

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()
