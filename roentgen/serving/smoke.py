"""One request through everything: does this server answer, and are the activations that it acknowledges really there?

Six steps, each of which can only pass if the one before did: the server is up; it is ours (a web server that answers 200 to
everything is not); it has the model; it answers a question; what it kept is in its store, whole and finite; and it can be
deleted. All of it goes over HTTP, so the same check runs on the cluster's head and through a tunnel.
"""

import io
import secrets
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from roentgen.contract import ActivationReply
from roentgen.serving.local_server import LaunchError, wait_until_ready
from roentgen.store import Session, verify

ROUTES = ("/v1/chat/completions", "/v1/models", "/v1/models/load", "/v1/activations/sessions")
REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class SmokeReport:
    """What was found.

    Attributes:
        model: served.
        answer: what the model said.
        rows: activation rows kept of it, one per token that passed through the model.
        tensors: hook points kept.
    """

    model: str
    answer: str
    rows: int
    tensors: tuple[str, ...]


def smoke(
    base: str, key: str, stage: Callable[[str], None], *, model: str | None = None, ready_timeout_s: float = 60
) -> SmokeReport:
    """Check a server with one request.

    Args:
        base: http://HOST:PORT.
        key: of the server; "" if it has none.
        stage: told what is being done.
        model: loaded if another is served; whatever is served if absent.
        ready_timeout_s: how long the server may take to be ready.

    Raises:
        LaunchError: saying which step failed and what was found instead.
    """
    stage(f"waiting for {base}/health")
    wait_until_ready(base, stage, ready_timeout_s)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=base, headers=headers, timeout=REQUEST_TIMEOUT_S) as client:
        stage("reading /openapi.json")
        routes = _call(client, "GET", "/openapi.json").json().get("paths", {})
        if missing := [route for route in ROUTES if route not in routes]:
            raise LaunchError(f"{base} is not a Roentgen server: /openapi.json lacks {', '.join(missing)}")
        name = _load(client, model, stage)
        stage("asking a question, activations kept")
        session = f"smoke-{secrets.token_hex(4)}"
        reply = _call(client, "POST", "/v1/chat/completions", _question(name, session)).json()
        try:
            return _check(client, name, session, reply, stage)
        finally:
            _call(client, "DELETE", f"/v1/activations/session/{session}")


def _load(client: httpx.Client, wanted: str | None, stage: Callable[[str], None]) -> str:
    served = str(_call(client, "GET", "/v1/models").json()["data"][0]["id"])
    if wanted in (None, served):
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
    client: httpx.Client, model: str, session: str, reply: dict[str, Any], stage: Callable[[str], None]
) -> SmokeReport:
    """Fetch what the server says it kept, and compare it with what it says of it."""
    stage("reading the activations back")
    kept = ActivationReply.model_validate(reply["activations"])
    rows = reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"] - 1
    archive = _call(client, "GET", f"/v1/activations/session/{session}/download").content
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        opened = Session.open(str(Path(folder) / session))
        checked = verify(opened)
        if not checked.ok or checked.rollouts != 1:
            raise LaunchError(f"session {session} holds {checked.rollouts} rollouts instead of one, or is damaged")
        for key in kept.tensors:
            values = opened.activations(key)[0].values.float().numpy()
            if values.shape[0] != rows or not np.isfinite(values).all():
                raise LaunchError(
                    f"{key} of session {session} has shape {values.shape} and should have {rows} finite rows"
                )
    return SmokeReport(model, str(reply["choices"][0]["message"]["content"]), rows, tuple(kept.tensors))


def _call(client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """Send a request.

    Raises:
        LaunchError: if it does not succeed.
    """
    try:
        response = client.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise LaunchError(f"{method} {path}: {error or type(error).__name__}") from error
    if response.is_error:
        raise LaunchError(f"{method} {path} answers {response.status_code}: {response.text[:1000]}")
    return response
