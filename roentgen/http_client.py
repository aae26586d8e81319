"""A plain HTTP client for servers. An evaluation's requests use OpenAI's SDK instead, which is also built on httpx2."""

from httpx2 import URL, Client, HTTPError, HTTPStatusError, InvalidURL

LAST_PORT = 65_535


def connect(base_url: str, key: str, timeout_s: float) -> Client:
    """Return a client that sends an API key as UTF-8; close it after use."""
    return Client(base_url=base_url, headers={b"Authorization": f"Bearer {key}".encode()}, timeout=timeout_s)


def server_root(address: str) -> str:
    """Return http://HOST:PORT for a server's address, which may lack http:// or end in a slash or /v1.

    Raises:
        ValueError: if it is not an address.
    """
    try:
        url = URL(address if "://" in address else f"http://{address}")
        valid = url.scheme in ("http", "https") and bool(url.host) and (url.port is None or 0 < url.port <= LAST_PORT)
    except (InvalidURL, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            f"{address!r} is not the address of a server; allowed are HOST:PORT, http://HOST:PORT and https://HOST, with ports "
            f"from 1 to {LAST_PORT}"
        )
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/")


def explain(error: HTTPError) -> str:
    """Describe a failed request: the server's answer, or why there is none."""
    if isinstance(error, HTTPStatusError):
        if error.response.status_code == 401:
            return "answers 401: the API key is missing or wrong; set ROENTGEN_API_KEY to the server's key"
        return f"answers {error.response.status_code}: {error.response.text[:1000]}"
    return f"fails: {str(error) or type(error).__name__}"
