"""Runs: what is given once, so that an unmodified client captures by the address that it calls.

`POST /v1/runs` takes `RunSettings`. A request to an address of the run (`http.run_addresses`) then counts as one that says all
of it itself: `with_settings` puts the settings into its body before it is checked, and `keyed` gives it the identity that its
address has. From there on it is a request like any other.
"""

from typing import Any, TypeVar

from pydantic import Field, JsonValue, ValidationError, model_validator

from roentgen.contract import ActivationRequest, RolloutKey, SessionId
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import ApiError, enumerated, from_validation, refused
from serve_app.openai_api.messages import Wire
from serve_app.openai_api.params import GenerationParams
from serve_app.openai_api.probe_params import MAX_ADDITIONS, MAX_PROBES, ProbeRequest, SteeringRequest
from serve_app.openai_api.responses.request import ResponsesRequest

_ASKED: tuple[tuple[type[GenerationParams], dict[str, Any]], ...] = (
    (ChatRequest, {"messages": [{"role": "user", "content": "?"}]}),
    (CompletionRequest, {"prompt": "?"}),
    (ResponsesRequest, {"input": "?"}),
)
"""The routes' requests, each with what is asked."""

_OF_THE_RUN = ("activations", "collect_activations", "probes", "steering")
_OF_EACH_REQUEST = ("model", "messages", "prompt", "input", "stream", "stream_options")
_ONE_THING = frozenset({"max_tokens", "max_completion_tokens"})
"""Two names of one parameter: a request that says one has said both."""

AnyRequest = TypeVar("AnyRequest", bound=GenerationParams)


class RunSettings(Wire):
    """The body of `POST /v1/runs`."""

    id: SessionId | None = Field(default=None, description="The run's name in addresses; made up if absent.")
    activations: ActivationRequest | None = Field(
        default=None, description="What to keep of every request; the session is named after the run if it names none."
    )
    probes: list[ProbeRequest] = Field(default=[], max_length=MAX_PROBES)
    steering: list[SteeringRequest] = Field(default=[], max_length=MAX_ADDITIONS)
    defaults: dict[str, JsonValue] = Field(
        default={},
        description="Other parameters of requests (temperature, max_tokens, seed), for those that say nothing.",
    )

    @model_validator(mode="after")
    def _can_be_asked(self) -> "RunSettings":
        if self.activations is not None and self.activations.key is not None:
            raise ValueError("activations.key: the addresses of a run name its rollouts; leave it out")
        defaults = self.defaults
        for name in defaults.keys() & {*_OF_THE_RUN, *_OF_EACH_REQUEST}:
            where = "is a setting of the run itself" if name in _OF_THE_RUN else "is each request's own"
            raise ValueError(f"defaults.{name}: {where}; leave it out here")
        unknown = sorted(name for name in defaults if not any(name in kind.model_fields for kind, _ in _ASKED))
        if unknown:
            raise ValueError(f"defaults.{unknown[0]}: no route knows this parameter")
        able = [(kind, asked) for kind, asked in _ASKED if defaults.keys() <= kind.model_fields.keys()]
        if not able:
            raise ValueError(f"defaults: no route takes all of {enumerated(sorted(defaults))} together")
        wrong: ApiError | None = None
        for kind, asked in able:
            try:
                kind.model_validate({"model": "?", **asked, **defaults, **self.given(*_OF_THE_RUN)})
                return self
            except ValidationError as error:
                wrong = wrong or from_validation(list(error.errors()))
        assert wrong is not None
        own = (wrong.param or "").partition(".")[0] in _OF_THE_RUN
        raise ValueError(wrong.message if own else f"defaults.{wrong.message}")

    def given(self, *names: str) -> dict[str, Any]:
        """Return, as JSON, those of some fields that are set, and of them what the client wrote."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, include=set(names))


def with_settings(body: Any, run_id: str, settings: RunSettings) -> Any:
    """Return a request's body with a run's settings where it says nothing itself.

    What a request says of `activations` goes before the run's, field by field and label by label.

    Args:
        body: the request's, as JSON.
        run_id: the run's.
        settings: the run's.

    Raises:
        ApiError: if the request names its rollout, which its address does already.
    """
    if not isinstance(body, dict):
        return body  # which will be refused
    own = {name: value for name, value in body.items() if value is not None}
    if "collect_activations" in own:
        raise refused("collect_activations", "a run's address goes with activations, which has all of it")
    defaults = settings.defaults
    if own.keys() & _ONE_THING:
        defaults = {name: value for name, value in defaults.items() if name not in _ONE_THING}
    merged = {**defaults, **settings.given("probes", "steering"), **own}
    given, asked = settings.given("activations").get("activations"), own.get("activations", {})
    if not isinstance(asked, dict) or (given is None and not asked):
        return merged
    for name in asked.keys() & {"key", "session_id"}:
        raise refused(f"activations.{name}", f"the address, of run {run_id!r}, says it already; leave it out")
    labels = [part["labels"] for part in (given or {}, asked) if isinstance(part.get("labels"), dict)]
    joined = {name: value for part in labels for name, value in part.items()}
    merged["activations"] = {"session_id": run_id, **(given or {}), **asked, **({"labels": joined} if joined else {})}
    return merged


def count_choices(request: GenerationParams) -> int:
    """Return how many rollouts a request makes."""
    return request.n * (len(request.prompts) if isinstance(request, CompletionRequest) else 1)


def keyed(request: AnyRequest, key: RolloutKey) -> AnyRequest:
    """Return a request whose first rollout has a key; those after it have the turns that follow."""
    assert request.activations is not None
    kept = {"activations": request.activations.model_copy(update={"key": key})}
    copied = request.model_copy(update=kept)
    if isinstance(copied, ResponsesRequest):
        return copied.asking(copied.chat.model_copy(update=kept))
    return copied
