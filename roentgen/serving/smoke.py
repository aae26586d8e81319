"""Checks a server end to end with one request: it must answer, and have stored the activations that it acknowledges.

The steps, each of which requires the previous one: the server is up; it is a Roentgen server (not any web server that answers
200); it has the model; it answers a question; the activations are in its store, complete and finite; they can be deleted.
Everything uses HTTP, so the same check runs on the cluster's head and through a tunnel.
"""

import secrets
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from httpx2 import URL, Client, HTTPError, Response

from roentgen.contract import ActivationReply
from roentgen.http_client import connect, explain
from roentgen.model_names import is_named
from roentgen.serving.local_server import LaunchError, wait_until_ready
from roentgen.store import Session, StoreError, verify
from roentgen.store.pulling import pull

ROUTES = ("/v1/chat/completions", "/v1/models", "/v1/models/load", "/v1/activations/sessions")
REQUEST_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class SmokeReport:
    """The result of the check."""

    model: str
    """Name of the served model."""
    answer: str
    """The model's answer."""
    rows: int
    """Number of stored rows, one per token that passed through the model."""
    tensors: tuple[str, ...]
    """Keys of the stored activations."""


def smoke(
    base: str, key: str, stage: Callable[[str], None], *, model: str | None = None, ready_timeout_s: float = 60
) -> SmokeReport:
    """Check a server with one request.

    Args:
        base: http://HOST:PORT.
        key: the server's API key.
        stage: called with each step.
        model: model to check, which is loaded if another one is served; None for the served one.
        ready_timeout_s: time limit for the server to become ready.

    Raises:
        LaunchError: if a step fails; the message says which one and why.
    """
    _check_answers(base)
    stage(f"waiting for {base}/health")
    wait_until_ready(base, stage, ready_timeout_s)
    with connect(base, key, REQUEST_TIMEOUT_S) as client:
        stage("reading /openapi.json")
        routes = _call(client, "GET", "/openapi.json").json().get("paths", {})
        if missing := [route for route in ROUTES if route not in routes]:
            raise LaunchError(f"{base} is not a Roentgen server: /openapi.json lacks {', '.join(missing)}")
        name = _load(client, model, stage)
        stage("asking a question and capturing activations")
        session = f"smoke-{secrets.token_hex(4)}"
        reply = _call(client, "POST", "/v1/chat/completions", _question(name, session)).json()
        try:
            report = _check(base, key, name, session, reply, stage)
        except LaunchError:
            with suppress(LaunchError):  # the first error is the relevant one
                _call(client, "DELETE", f"/v1/activations/session/{session}")
            raise
        _call(client, "DELETE", f"/v1/activations/session/{session}")
        return report


def _check_answers(base: str) -> None:
    """Distinguish a starting server from an address without a server or with another one.

    Raises:
        LaunchError: if there is no server, or another one.
    """
    url = URL(base)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise LaunchError(
            f"no connection to {url.host}:{port} ({error.strerror or error}): start a server there (`roentgen serve`), or "
            "open a tunnel: ssh -N -L PORT:localhost:PORT CLUSTER"
        ) from error
    try:
        with Client(base_url=base, timeout=CONNECT_TIMEOUT_S) as client:
            found, serves = client.get("/health"), client.get("/-/healthz")
    except HTTPError:
        return  # it may be starting
    if (
        found.status_code == 404 and serves.status_code == 404
    ):  # Serve's proxy, before it has an application, has the second
        raise LaunchError(f"{base} is not a Roentgen server: GET /health answers 404")


def _load(client: Client, wanted: str | None, stage: Callable[[str], None]) -> str:
    card = _call(client, "GET", "/v1/models").json()["data"][0]
    served = str(card["id"])
    if wanted is None or is_named(wanted, (served, str(card.get("root", served)))):
        return served
    stage(f"loading {wanted} in place of {served}")
    return str(_call(client, "POST", "/v1/models/load", {"model_id": wanted}).json()["id"])


def _question(model: str, session: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "What is 12 * 7?"}],
        "max_tokens": 8,
        "temperature": 0,
        "activations": {"session_id": session, "layers": [0, -1], "hook_points": ["resid_post"]},
    }


def _check(
    base: str, key: str, model: str, session: str, reply: dict[str, Any], stage: Callable[[str], None]
) -> SmokeReport:
    """Fetch the stored activations, and compare them with the server's reply."""
    stage("reading the activations back")
    kept = ActivationReply.model_validate(reply["activations"])
    rows = reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"] - 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            opened = Session.open(pull(f"{base}/v1/activations/session/{session}", folder, api_key=key))
        except StoreError as error:
            raise LaunchError(str(error)) from error
        checked = verify(opened)
        if not checked.ok or checked.rollouts != 1:
            raise LaunchError(f"session {session} has {checked.rollouts} rollouts instead of one, or is damaged")
        for stored in kept.tensors:
            values = opened.activations(stored)[0].values.float().numpy()
            if values.shape[0] != rows or not np.isfinite(values).all():
                raise LaunchError(
                    f"{stored} of session {session} has shape {values.shape}; expected {rows} finite rows"
                )
    return SmokeReport(model, str(reply["choices"][0]["message"]["content"]), rows, tuple(kept.tensors))


def _call(client: Client, method: str, path: str, body: dict[str, Any] | None = None) -> Response:
    """Send a request.

    Raises:
        LaunchError: if it does not succeed.
    """
    try:
        return client.request(method, path, json=body).raise_for_status()
    except HTTPError as error:
        raise LaunchError(f"{method} {path} {explain(error)}") from error
