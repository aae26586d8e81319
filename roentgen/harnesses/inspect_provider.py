"""The provider `roentgen/<model>` of inspect_ai: a Roentgen server, with what to keep said once, as arguments of the model.

    inspect eval task.py --model roentgen/smollm2-135m -M layers=8,12 -M hook_points=resid_post -M positions=last_prompt

Every call is keyed by the task's execution, the sample, its epoch, and which of the sample's calls it is; a call that
inspect_ai tries again keeps its number. What comes back beside the reply goes into the output's metadata: where the rows are,
and what probes gave, but no row.
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
        """Give a call the lowest number that no other has; one that fails gives it back, and is tried again under it."""
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
"""Of the samples that run now: their calls are numbered together, whichever model they go to."""


class RoentgenAPI(OpenAICompatibleAPI):
    """A Roentgen server."""

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
        """Take what inspect_ai is given as arguments of the model: in Python, or as `-M NAME=VALUE`.

        Args:
            model_name: the served model's.
            base_url: the server's; else `$ROENTGEN_BASE_URL`, else http://127.0.0.1:8000/v1.
            api_key: its key; else `$ROENTGEN_API_KEY`.
            config: inspect_ai's.
            session: where rows are kept. Nothing is, unless one of the following says what.
            layers: as 8,12 or all.
            hook_points: as resid_post,mlp_out.
            positions: a position policy.
            dtype: what to store.
            since: "turn" for what is new in each turn of a conversation.
            labels: stored with every rollout.
            allow_non_finite: whether rows with NaN or infinity are kept.
            probes: saved probes to score every token with: their paths, or an object as in docs/http.md.
            steering: what to add to the stream, as in docs/http.md.
            join: whether the task's scores are joined at its end (the hook reads it).
            model_args: of inspect_ai's OpenAI-compatible providers.

        Raises:
            ValueError: if something to be kept cannot be; naming the argument.
        """
        if model_args.get("responses_api"):
            raise ValueError("responses_api: inspect_ai sends no activations to the Responses API; leave it out")
        own = (layers, hook_points, positions, dtype, since, labels, allow_non_finite)
        given = {name: value for name, value in zip(_CAPTURE, own, strict=True) if value is not None}
        self._kept = _capture(session, given) if given else None
        self._probes = [probes] if isinstance(probes, str | Mapping) else list(probes or ())
        self._steering = [steering] if isinstance(steering, Mapping) else list(steering or ())
        if self._probes and model_args.get("stream") is True:
            raise ValueError("stream: scores of probes come with whole replies here; leave stream or probes out")
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
        """Ask the server; where the rows are is in the output's metadata."""
        sample = sample_active()
        if sample is None:
            return await self._asked(input, tools, tool_choice, config, None)
        with _CALLS.setdefault(sample, Calls()).number() as number:
            return await self._asked(input, tools, tool_choice, config, _key(sample, number))

    async def _asked(
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
        """Put a stream together; what the SDK does not know of is in the last chunk."""
        kept: dict[str, Any] = {}

        async def watched() -> AsyncIterator[ChatCompletionChunk]:
            async for chunk in stream:
                kept.update({name: value for name, value in (chunk.model_extra or {}).items() if name == "activations"})
                yield chunk

        completion: ChatCompletion = await super().stream_completion(watched())
        return completion.model_copy(update=kept)

    def auto_streamable(self, config: GenerateConfig) -> bool:
        """Stream by itself only what loses nothing by it."""
        return not self._probes and bool(super().auto_streamable(config))


def _capture(session: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return what to keep as the request says it, checked here, before a task begins."""
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
    """Write what `-M layers=8,12` has become as it was written."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _key(sample: ActiveSample, number: int) -> dict[str, Any]:
    problem = f"{sample.task}/{sample.sample.id}"
    if len(problem) > _MAX_PROBLEM:
        problem = f"{problem[: _MAX_PROBLEM - 17]}-{canonical_hash(problem)}"
    return {"config_hash": sample.eval_id, "problem_id": problem, "epoch": sample.epoch, "turn": number}


def _reference(base_url: str, response: dict[str, Any]) -> dict[str, Any]:
    """Return what a log says of a reply's activations and scores."""
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
    """Sum up a probe's scores of a choice: at the prompt's last token, and of what was generated."""
    scores, n_prompt = probed["scores"], probed["n_prompt"]
    found = {name: probed[name] for name in ("probe", "key", "label", "classes", "unit")}
    if scores and isinstance(scores[0], list):
        return found | {"last_prompt": scores[n_prompt - 1], "last": scores[-1]}
    said = scores[n_prompt:]
    summed = {"mean_generated": sum(said) / len(said), "max_generated": max(said)} if said else {}
    return found | {"last_prompt": scores[n_prompt - 1], "last": scores[-1], **summed}
