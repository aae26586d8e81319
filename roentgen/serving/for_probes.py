"""Provides a server of a saved probe's model: a given one, or one that is started temporarily."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Protocol

from openai import APIError, OpenAI

from eval_jobs.endpoint import Endpoint, FatalRequestError, resolve_endpoint
from probes.steering import SweepError
from roentgen.api_keys import client_key
from roentgen.contract import quantize_again
from roentgen.linear_probe import SavedProbe
from roentgen.runs import Run
from roentgen.serving.local_server import serving
from serve_app.config import ServerConfig

RETRIES = 4


class ServerChoice(Protocol):
    """Settings that name a server, or the model to start one with."""

    @property
    def base_url(self) -> str | None:
        """Base URL of a running server; None to start one."""

    @property
    def model(self) -> str | None:
        """The model to serve; None for the probe's own."""


@contextmanager
def model_server(asked: ServerChoice, run: Run, probe: SavedProbe, stage: Callable[[str], None]) -> Iterator[str]:
    """Provide a server of a probe's model within a context; yields its base URL.

    Raises:
        SweepError: if the given server does not answer.
    """
    if asked.base_url is not None:
        try:
            settled = resolve_endpoint(Endpoint(asked.base_url, api_key=client_key()))
        except FatalRequestError as error:
            raise SweepError(str(error)) from error
        yield settled.base_url
        return
    settings, hashed, card = run.config.settings, run.config.hashed, probe.card
    given = {name: settings[name] for name in ("dtype", "device", "revision") if settings.get(name) is not None}
    given["quantize"] = quantize_again(hashed.get("quantization"))
    is_runs = (hashed.get("model"), hashed.get("revision")) == (card.model, card.revision)
    model = asked.model or (run.config.model_root if is_runs else card.model)
    # A sweep stores no activations, but the server needs a store.
    with (
        TemporaryDirectory(prefix="roentgen-steer-") as store,
        serving(ServerConfig(model=model, store=store, taps=(card.key,), **given), stage=stage) as url,
    ):
        yield url


def served_name(url: str, probe: SavedProbe) -> str:
    """Return the server's name of a probe's model, which is identified by its revision, since a folder may have been renamed.

    Raises:
        SweepError: if the server has another model.
    """
    try:
        listed = OpenAI(base_url=url, api_key=client_key(), max_retries=RETRIES).models.list()
        revisions = {model.id: (model.model_extra or {}).get("revision") for model in listed}
    except APIError as error:
        raise SweepError(f"the server at {url} did not list its models: {error.message}") from error
    card = probe.card
    name = next((name for name, revision in revisions.items() if revision == card.revision), None)
    if name is None:
        found = ", ".join(f"{name} ({revision})" for name, revision in revisions.items())
        raise SweepError(f"the probe belongs to {card.model} ({card.revision}), but {url} serves {found}")
    return name
