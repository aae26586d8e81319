"""Converts Python arguments into the server's requests.

The server's own code (`serve_app.requests.planning`) then validates and plans a request, with the same error messages: an
error names the field, the value and what is allowed. Only a field's name may differ: HTTP's `activations` is `capture` here.
"""

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from roentgen.api.steer import Steer, find_probe, is_vector
from roentgen.extensions import preview
from roentgen.linear_probe import SavedProbe
from roentgen.stop_rule import StopWhen
from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.steering import SteeringVector
from serve_app.config import ServerConfig
from serve_app.engines.probe_stopping import StopRule
from serve_app.engines.served_model import ServedModel
from serve_app.errors import RequestError
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import ApiError, from_validation
from serve_app.openai_api.probe_params import SteeringRequest
from serve_app.requests.generation import Choice, Runner
from serve_app.requests.planning import plan_chat, plan_completion
from serve_app.requests.probes_and_steering import check_probe, make_steering_vector, saved_scorer

Conversation = Sequence[Mapping[str, Any]]
"""Messages, as the chat route takes them."""
Prompt = str | Conversation
ALLOWED = 'allowed are a text, and a conversation: a list of {"role": …, "content": …}'

CAPTURE_FIELDS = ("layers", "hook_points", "positions", "dtype", "allow_non_finite")
"""Fields of a capture in memory."""

OWN = frozenset(
    (
        "model",
        "prompt",
        "messages",
        "stream",
        "stream_options",
        "activations",
        "collect_activations",
        "echo",
        "logprobs",
    )
)
"""Fields of a request that `generate` sets itself, or that only affect the reply's format."""

Checked = TypeVar("Checked", bound=BaseModel)


def checked(kind: type[Checked], values: Mapping[str, Any]) -> Checked:
    """Create a validated request or configuration.

    Raises:
        RequestError: if a value is not allowed; it names the first one.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise in_python(from_validation(error.errors())) from error


def named(model: Any) -> Any:
    """Return a model's name; a path is converted to text."""
    return str(model) if isinstance(model, Path) else model


def in_python(error: RequestError, prompt: int | None = None) -> RequestError:
    """Return an error with the name of the Python argument; for one of several prompts, with the prompt's index."""
    message, param = error.message, error.param
    message = re.sub(r"\bactivations(?=\.[a-z_]|: )", "capture", message).replace("by this server", "here")
    if param is not None:
        param = re.sub(r"^activations\b", "capture", param)
    if prompt is not None and param is not None and param.partition(".")[0] in ("prompt", "messages"):
        message = f"prompts[{prompt}]: {message}"
    return ApiError(error.status, message, param=param, code=error.code)


def prompts_of(given: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Return a list of prompts for one prompt or several.

    Raises:
        TypeError: if a prompt is neither a text nor a conversation.
    """
    if isinstance(given, bytes | Mapping) or not isinstance(given, Iterable):
        raise TypeError(f"prompts: {preview(given)} is not a prompt; {ALLOWED}")
    prompts: list[Any] = [given] if isinstance(given, str) else list(given)
    if prompts and all(isinstance(one, Mapping) for one in prompts):  # one conversation
        prompts = [prompts]
    for place, one in enumerate(prompts):
        listed = isinstance(one, Sequence) and not isinstance(one, bytes)
        if not isinstance(one, str) and not (listed and all(isinstance(message, Mapping) for message in one)):
            raise TypeError(f"prompts[{place}]: {preview(one)} is not a prompt; {ALLOWED}")
    return prompts


def capture_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the fields of `capture` to those of a request; a single layer or hook point becomes a list.

    Raises:
        RequestError: if a field is unknown.
    """
    fields = dict(given)
    if unknown := sorted(fields.keys() - set(CAPTURE_FIELDS)):
        raise ApiError(
            400,
            f"capture.{unknown[0]}: unknown field; allowed are {', '.join(CAPTURE_FIELDS)}",
            param=f"capture.{unknown[0]}",
            code="unsupported_parameter",
        )
    layers, hook_points = fields.get("layers"), fields.get("hook_points")
    if layers is not None and not isinstance(layers, str):
        fields["layers"] = [_whole(layer) for layer in (layers if isinstance(layers, Iterable) else [layers])]
    if hook_points is not None:
        fields["hook_points"] = [hook_points] if isinstance(hook_points, str) else list(hook_points)
    return fields


def _whole(number: Any) -> Any:
    """Convert a NumPy integer to Python's; other values are returned unchanged, and the request refuses them."""
    return operator.index(number) if hasattr(number, "__index__") and not isinstance(number, bool) else number


def plan(runner: Runner, config: ServerConfig, prompt: Prompt, params: Mapping[str, Any]) -> list[Choice]:
    """Return the planned generations of a prompt.

    Raises:
        RequestError: if a parameter is not allowed.
    """
    if isinstance(prompt, str):
        only_read = {"echo": True} if params.get("max_tokens") == 0 else {}
        request = checked(CompletionRequest, {**params, **only_read, "prompt": prompt})
        return plan_completion(runner, request, config).choices
    chat = checked(ChatRequest, {**params, "messages": [dict(message) for message in prompt]})
    return plan_chat(runner, chat, config).choices


def scorers(model: ServedModel, probes: Mapping[str, SavedProbe]) -> tuple[RequestProbe, ...]:
    """Return the scorers for probes.

    Raises:
        RequestError: if a probe is not of this model.
    """
    found = []
    for name, probe in probes.items():
        check_probe(model, name, probe, f"probes[{name!r}]")
        found.append(saved_scorer(model, name, probe, f"probes[{name!r}]"))
    return tuple(found)


def stop_rules(
    probes: Sequence[RequestProbe], stop_when: Mapping[str, Mapping[str, Any]]
) -> list[tuple[StopRule, str]]:
    """Return the stop rules, each with the name of its argument.

    Raises:
        RequestError: if a value is not allowed, or a rule names an unknown probe.
    """
    places = {probe.name: place for place, probe in enumerate(probes)}
    rules: list[tuple[StopRule, str]] = []
    for name, fields in stop_when.items():
        param = f"stop_when[{name!r}]"
        if name not in places:
            there = ", ".join(places) or "none"
            raise ApiError(400, f"{param}: {name!r} is not one of the probes; allowed are {there}", param=param)
        try:
            rules.append((StopRule(places[name], checked(StopWhen, fields)), param))
        except RequestError as error:
            raise ApiError(error.status, f"{param}.{error.message}", param=param, code=error.code) from error
    return rules


def steering_vectors(model: ServedModel, steering: Steer | Sequence[Steer]) -> tuple[SteeringVector, ...]:
    """Return what is added to a generation's stream.

    Raises:
        RequestError: naming the vector that cannot be added, and why.
        TypeError: if one is no `Steer`, or its direction neither a probe nor numbers.
        SavedProbeError: if there is no probe at a path.
    """
    several = [steering] if isinstance(steering, Steer) else steering
    for place, one in enumerate(several):
        if not isinstance(one, Steer):
            raise TypeError(f"steering[{place}]: {preview(one)} is not a roentgen.Steer")
    return tuple(_steering_vector(model, one, f"steering[{place}]") for place, one in enumerate(several))


def _steering_vector(model: ServedModel, one: Steer, param: str) -> SteeringVector:
    fields = {
        "layer": one.layer if one.layer is None else _whole(one.layer),
        "hook_point": one.hook_point,
        "scale": one.scale.item() if hasattr(one.scale, "item") else one.scale,
        "positions": one.positions,
        "output": one.output,
    }
    try:
        if is_vector(one.direction):
            numbers = one.direction.tolist() if hasattr(one.direction, "tolist") else list(one.direction)
            return make_steering_vector(model, checked(SteeringRequest, {**fields, "vector": numbers}), None, param)
        probe = find_probe(one.direction, param)
        asked = checked(SteeringRequest, {**fields, "probe": probe.card.name})
        check_probe(model, probe.card.name, probe, param)
        return make_steering_vector(model, asked, probe, param)
    except RequestError as error:
        within = error.message if error.message.startswith(param) else f"{param}.{error.message}"
        raise ApiError(error.status, within, param=error.param, code=error.code) from error
