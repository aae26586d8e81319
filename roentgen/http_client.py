"""Plain HTTP to a server. Requests of an evaluation go through OpenAI's SDK instead, which is built on httpx2 too."""

from httpx2 import Client, HTTPError, HTTPStatusError


def connect(base_url: str, key: str, timeout_s: float) -> Client:
    """Return a client that sends a key as UTF-8; close it after use."""
    return Client(base_url=base_url, headers={b"Authorization": f"Bearer {key}".encode()}, timeout=timeout_s)


def explain(error: HTTPError) -> str:
    """Say how a request failed: what the server answered, or why no answer came."""
    if isinstance(error, HTTPStatusError):
        return f"answers {error.response.status_code}: {error.response.text[:1000]}"
    return f"fails: {str(error) or type(error).__name__}"
