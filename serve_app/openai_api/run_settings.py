"""Run settings: stored once, so that an unmodified client captures activations through the base URL that it calls.

`POST /v1/runs` takes `RunSettings`. They apply to every request to an address of the run (`http.run_addresses`):
`with_settings` merges the settings into its body before validation, and `keyed` adds the rollout key of its address. After
that it is handled like any other request.
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

_ROUTES: tuple[tuple[type[GenerationParams], dict[str, Any]], ...] = (
    (ChatRequest, {"messages": [{"role": "user", "content": "?"}]}),
    (CompletionRequest, {"prompt": "?"}),
    (ResponsesRequest, {"input": "?"}),
)
"""The routes' request models, each with a minimal prompt."""

_RUN_FIELDS = ("activations", "collect_activations", "probes", "steering")
_REQUEST_FIELDS = ("model", "messages", "prompt", "input", "stream", "stream_options")
_SYNONYMS = frozenset({"max_tokens", "max_completion_tokens"})
"""Two names of one parameter: a request that sets one overrides both."""

AnyRequest = TypeVar("AnyRequest", bound=GenerationParams)


class RunSettings(Wire):
    """The body of `POST /v1/runs`."""

    id: SessionId | None = Field(default=None, description="The run's id in addresses; generated if absent.")
    activations: ActivationRequest | None = Field(
        default=None,
        description="Activations to capture for every request; the session is named after the run by default.",
    )
    probes: list[ProbeRequest] = Field(default=[], max_length=MAX_PROBES)
    steering: list[SteeringRequest] = Field(default=[], max_length=MAX_ADDITIONS)
    defaults: dict[str, JsonValue] = Field(
        default={},
        description="Defaults of other request parameters (temperature, max_tokens, seed).",
    )

    @model_validator(mode="after")
    def _is_valid_for_a_route(self) -> "RunSettings":
        if self.activations is not None and self.activations.key is not None:
            raise ValueError("activations.key: not allowed; a run's addresses identify its rollouts")
        defaults = self.defaults
        for name in defaults.keys() & {*_RUN_FIELDS, *_REQUEST_FIELDS}:
            where = "set it on the run itself" if name in _RUN_FIELDS else "set it on each request"
            raise ValueError(f"defaults.{name}: not allowed here; {where}")
        unknown = sorted(name for name in defaults if not any(name in kind.model_fields for kind, _ in _ROUTES))
        if unknown:
            raise ValueError(f"defaults.{unknown[0]}: unknown parameter; no route has it")
        able = [(kind, asked) for kind, asked in _ROUTES if defaults.keys() <= kind.model_fields.keys()]
        if not able:
            raise ValueError(f"defaults: no single route has all of the parameters {enumerated(sorted(defaults))}")
        wrong: ApiError | None = None
        for kind, asked in able:
            try:
                kind.model_validate({"model": "?", **asked, **defaults, **self.given(*_RUN_FIELDS)})
                return self
            except ValidationError as error:
                wrong = wrong or from_validation(list(error.errors()))
        assert wrong is not None
        own = (wrong.param or "").partition(".")[0] in _RUN_FIELDS
        raise ValueError(wrong.message if own else f"defaults.{wrong.message}")

    def given(self, *names: str) -> dict[str, Any]:
        """Return the named fields as JSON, as far as the client set them."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, include=set(names))


def with_settings(body: Any, run_id: str, settings: RunSettings) -> Any:
    """Merge a run's settings into a request's body; the body takes precedence.

    `activations` are merged field by field and label by label.

    Args:
        body: the request's body, as JSON.
        run_id: id of the run.
        settings: settings of the run.

    Raises:
        ApiError: if the request identifies its rollout, which its address already does.
    """
    if not isinstance(body, dict):
        return body  # validation refuses it
    own = {name: value for name, value in body.items() if value is not None}
    if "collect_activations" in own:
        raise refused("collect_activations", "not allowed at a run's address; use activations instead")
    defaults = settings.defaults
    if own.keys() & _SYNONYMS:
        defaults = {name: value for name, value in defaults.items() if name not in _SYNONYMS}
    merged = {**defaults, **settings.given("probes", "steering"), **own}
    given, asked = settings.given("activations").get("activations"), own.get("activations", {})
    if not isinstance(asked, dict) or (given is None and not asked):
        return merged
    for name in asked.keys() & {"key", "session_id"}:
        raise refused(f"activations.{name}", f"not allowed here; the address of run {run_id!r} determines it")
    labels = [part["labels"] for part in (given or {}, asked) if isinstance(part.get("labels"), dict)]
    joined = {name: value for part in labels for name, value in part.items()}
    merged["activations"] = {"session_id": run_id, **(given or {}), **asked, **({"labels": joined} if joined else {})}
    return merged


def count_choices(request: GenerationParams) -> int:
    """Return the number of rollouts that a request makes."""
    return request.n * (len(request.prompts) if isinstance(request, CompletionRequest) else 1)


def keyed(request: AnyRequest, key: RolloutKey) -> AnyRequest:
    """Return a request whose first rollout has the given key; further rollouts get the following turns."""
    assert request.activations is not None
    kept = {"activations": request.activations.model_copy(update={"key": key})}
    copied = request.model_copy(update=kept)
    if isinstance(copied, ResponsesRequest):
        return copied.asking(copied.chat.model_copy(update=kept))
    return copied
