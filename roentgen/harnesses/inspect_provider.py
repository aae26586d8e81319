"""The inspect_ai provider `roentgen/<model>` for a Roentgen server; the model's arguments configure the capture.

    inspect eval task.py --model roentgen/smollm2-135m -M layers=8,12 -M hook_points=resid_post -M positions=last_prompt

Every call has a key of the task's execution, the sample, its epoch and the number of the call; a call that inspect_ai retries
keeps its number. The location of the stored rows and the probe scores are added to the output's metadata, but not the rows.
"""

import os
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any
from weakref import WeakKeyDictionary

from inspect_ai.log._samples import ActiveSample, sample_active
from inspect_ai.model import ChatMessage, GenerateConfig, ModelCall, ModelOutput
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI
from inspect_ai.tool import ToolChoice, ToolInfo
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from roentgen import api_keys
from roentgen.contract import ActivationRequest, canonical_hash, read_layers, read_names
from roentgen.harnesses.inspect_log import REFERENCE

BASE_URL = "http://127.0.0.1:8000/v1"
_MAX_PROBLEM = 200
_CAPTURE = ("layers", "hook_points", "positions", "dtype", "since", "labels", "allow_non_finite")


class Calls:
    """Numbers the calls of one attempt at a sample."""

    def __init__(self) -> None:
        self._next = 0
        self._given_back: list[int] = []

    @contextmanager
    def number(self) -> Iterator[int]:
        """Give a call the lowest free number; a failed call returns its number, so that its retry gets it again."""
        if self._given_back:
            number = heappop(self._given_back)
        else:
            number, self._next = self._next, self._next + 1
        try:
            yield number
        except BaseException:
            heappush(self._given_back, number)
            raise


_CALLS: WeakKeyDictionary[ActiveSample, Calls] = WeakKeyDictionary()
"""Call counters of the running samples; the calls of one sample are numbered across models."""


class RoentgenAPI(OpenAICompatibleAPI):
    """The provider for a Roentgen server."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - as every provider's
        session: str = "inspect",
        layers: Any = None,
        hook_points: Any = None,
        positions: str | None = None,
        dtype: str | None = None,
        since: str | None = None,
        labels: dict[str, Any] | None = None,
        allow_non_finite: bool | None = None,
        probes: Any = None,
        steering: Any = None,
        join: bool = True,
        **model_args: Any,
    ) -> None:
        """Create the provider from the model's arguments, in Python or as `-M NAME=VALUE`.

        Args:
            model_name: name of the served model.
            base_url: the server's base URL; default `$ROENTGEN_BASE_URL`, else http://127.0.0.1:8000/v1.
            api_key: the server's API key; default `$ROENTGEN_API_KEY`.
            config: inspect_ai's generation settings.
            session: session for activations. Nothing is captured unless one of the following arguments is set.
            layers: layers to capture, such as 8,12 or all.
            hook_points: hook points to capture, such as resid_post,mlp_out.
            positions: token positions to capture.
            dtype: data type of the stored rows.
            since: "turn" to capture only what is new in each turn of a conversation.
            labels: labels stored with every rollout.
            allow_non_finite: whether to keep rows with NaN or infinity.
            probes: saved probes that score every token: their paths, or objects as in docs/http.md.
            steering: vectors to add to the residual stream, as in docs/http.md.
            join: whether to join the task's scores at its end (read by the hook).
            model_args: arguments of inspect_ai's OpenAI-compatible providers.

        Raises:
            ValueError: if an argument is not valid; the message names it.
        """
        if model_args.get("responses_api"):
            raise ValueError(
                "responses_api: not supported, because inspect_ai cannot request activations with it; leave it out"
            )
        own = (layers, hook_points, positions, dtype, since, labels, allow_non_finite)
        given = {name: value for name, value in zip(_CAPTURE, own, strict=True) if value is not None}
        self._kept = _capture(session, given) if given else None
        self._probes = [probes] if isinstance(probes, str | Mapping) else list(probes or ())
        self._steering = [steering] if isinstance(steering, Mapping) else list(steering or ())
        if self._probes and model_args.get("stream") is True:
            raise ValueError("stream: not supported with probes; leave out stream or probes")
        super().__init__(
            model_name=model_name,
            base_url=base_url or os.environ.get("ROENTGEN_BASE_URL") or BASE_URL,
            api_key=api_key or api_keys.client_key(),
            config=config,
            service="roentgen",
            **model_args,
        )

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput | tuple[ModelOutput | Exception, ModelCall]:
        """Send a request to the server; the output's metadata locates the stored rows."""
        sample = sample_active()
        if sample is None:
            return await self._request(input, tools, tool_choice, config, None)
        with _CALLS.setdefault(sample, Calls()).number() as number:
            return await self._request(input, tools, tool_choice, config, _key(sample, number))

    async def _request(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
        key: dict[str, Any] | None,
    ) -> ModelOutput | tuple[ModelOutput | Exception, ModelCall]:
        body: dict[str, Any] = {}
        if self._kept is not None:
            keyed = {"key": key} if key is not None and (config.num_choices or 1) == 1 else {}
            body["activations"] = self._kept | keyed
        body |= {"probes": self._probes} if self._probes else {}
        body |= {"steering": self._steering} if self._steering else {}
        if body:
            config = config.model_copy(update={"extra_body": {**body, **(config.extra_body or {})}})
        result = await super().generate(input, tools, tool_choice, config)
        if isinstance(result, tuple) and isinstance(result[0], ModelOutput) and isinstance(result[1].response, dict):
            output, call = result
            if reference := _reference(str(self.base_url), result[1].response):
                output.metadata = {**(output.metadata or {}), REFERENCE: reference}
            return output, call
        return result

    async def stream_completion(self, stream: AsyncIterable[ChatCompletionChunk]) -> ChatCompletion:
        """Assemble a stream, with `activations` from its last chunk, which the SDK does not know."""
        kept: dict[str, Any] = {}

        async def watched() -> AsyncIterator[ChatCompletionChunk]:
            async for chunk in stream:
                kept.update({name: value for name, value in (chunk.model_extra or {}).items() if name == "activations"})
                yield chunk

        completion: ChatCompletion = await super().stream_completion(watched())
        return completion.model_copy(update=kept)

    def auto_streamable(self, config: GenerateConfig) -> bool:
        """Return whether inspect_ai may stream on its own: not with probes, whose scores would be lost."""
        return not self._probes and bool(super().auto_streamable(config))


def _capture(session: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the request's `activations`, validated before the task starts."""
    read = {name: _listed(value) if name in ("layers", "hook_points") else value for name, value in given.items()}
    asked = {"session_id": session, **read}
    for name, reader in (("layers", read_layers), ("hook_points", read_names)):
        if name in asked:
            try:
                asked[name] = reader(asked[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    try:
        ActivationRequest.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        name = "session" if first["loc"][:1] == ("session_id",) else ".".join(map(str, first["loc"]))
        raise ValueError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from error
    return asked


def _listed(value: Any) -> Any:
    """Convert the value of `-M layers=8,12` back to its text."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _key(sample: ActiveSample, number: int) -> dict[str, Any]:
    problem = f"{sample.task}/{sample.sample.id}"
    if len(problem) > _MAX_PROBLEM:
        problem = f"{problem[: _MAX_PROBLEM - 17]}-{canonical_hash(problem)}"
    return {"config_hash": sample.eval_id, "problem_id": problem, "epoch": sample.epoch, "turn": number}


def _reference(base_url: str, response: dict[str, Any]) -> dict[str, Any]:
    """Return the log's reference to a reply's activations and scores."""
    found: dict[str, Any] = {}
    if kept := response.get("activations"):
        rollouts = kept.get("rollouts", [kept])
        found = {
            "session": f"{base_url.rstrip('/')}/activations/session/{kept['session_id']}",
            "uri": rollouts[0]["uri"],
            "rollout_ids": [rollout["rollout_id"] for rollout in rollouts],
            "keys": list(rollouts[0]["tensors"]),
            "rows": sum(rollout["row_stop"] - rollout["row_start"] for rollout in rollouts),
        }
    if scored := [_scores(one) for choice in response.get("choices", []) for one in choice.get("probes") or []]:
        found["probes"] = scored
    return found


def _scores(probed: dict[str, Any]) -> dict[str, Any]:
    """Summarize a probe's scores of a choice: at the prompt's last token, and over the generated tokens."""
    scores, n_prompt = probed["scores"], probed["n_prompt"]
    found = {name: probed[name] for name in ("probe", "key", "label", "classes", "unit")}
    if scores and isinstance(scores[0], list):
        return found | {"last_prompt": scores[n_prompt - 1], "last": scores[-1]}
    new = scores[n_prompt:]
    summary = {"mean_generated": sum(new) / len(new), "max_generated": max(new)} if new else {}
    return found | {"last_prompt": scores[n_prompt - 1], "last": scores[-1], **summary}
