"""The API keys in `$ROENTGEN_API_KEY`, comma-separated: a server accepts each of them, a client sends the first."""

import os

VARIABLE = "ROENTGEN_API_KEY"


def api_keys(text: str | None = None) -> list[str]:
    """Return the keys in a text, by default the environment's; none means that the server is open, and on loopback only."""
    return [key.strip() for key in (os.environ.get(VARIABLE, "") if text is None else text).split(",") if key.strip()]


def client_key(text: str | None = None) -> str:
    """Return the key that a client sends; "none" if there is none, since OpenAI's SDK requires one."""
    return next(iter(api_keys(text)), "none")
