"""A server of the model that a saved probe is of: the one that is named, or one that is started for as long as it takes."""

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


class Named(Protocol):
    """What says which server, or which model to start one with."""

    @property
    def base_url(self) -> str | None:
        """A server that runs; None to start one."""

    @property
    def model(self) -> str | None:
        """The model to start it with; None for the probe's own."""


@contextmanager
def model_server(asked: Named, run: Run, probe: SavedProbe, stage: Callable[[str], None]) -> Iterator[str]:
    """Yield the address of a server of a probe's model: the one that is named, or one that is started for as long.

    Raises:
        SweepError: if the one that is named does not answer.
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
    # A sweep stores no activations; the server wants a place for them all the same.
    with (
        TemporaryDirectory(prefix="roentgen-steer-") as store,
        serving(ServerConfig(model=model, store=store, taps=(card.key,), **given), stage=stage) as url,
    ):
        yield url


def served_name(url: str, probe: SavedProbe) -> str:
    """Return what the probe's model is called there: a folder that has another name by now is the same model.

    Raises:
        SweepError: if another model is served, before a thousand requests find out.
    """
    try:
        listed = OpenAI(base_url=url, api_key=client_key(), max_retries=RETRIES).models.list()
        revisions = {model.id: (model.model_extra or {}).get("revision") for model in listed}
    except APIError as error:
        raise SweepError(f"the server at {url} cannot be asked for its models: {error.message}") from error
    card = probe.card
    name = next((name for name, revision in revisions.items() if revision == card.revision), None)
    if name is None:
        found = ", ".join(f"{name} ({revision})" for name, revision in revisions.items())
        raise SweepError(f"the probe is of {card.model} ({card.revision}); {url} serves {found}")
    return name
