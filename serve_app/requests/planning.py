"""Plans a validated request: converts it to choices for the engine, with the model's tokenizer and limits.

Everything that can be checked in advance is checked here, before anything is queued: a prompt that is too long, a hook point
that the model lacks, a reply that would be too large.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from ulid import ULID

from roentgen.contract import SAMPLED_FEATURES, STEERING_LABEL, ActivationRequest, Positions, captured_as, count_rows
from roentgen.tokenized_text import TokenizedText
from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.rows import CapturePlan
from serve_app.capture.steering import SteeringVector
from serve_app.config import ServerConfig
from serve_app.engines.constraints import Grammar
from serve_app.engines.probe_stopping import Acted, Stopping
from serve_app.engines.served_model import ServedModel
from serve_app.engines.storage import Done
from serve_app.models.context import UNBOUNDED
from serve_app.models.tokenization import ASSISTANT, COMPLETION, cut_prompt
from serve_app.openai_api.chat import ChatReply, ChatRequest
from serve_app.openai_api.collect_activations import legacy_key
from serve_app.openai_api.completions import CompletionReply, CompletionRequest, raw_prompt
from serve_app.openai_api.effort import effort_variables
from serve_app.openai_api.errors import ApiError, refused
from serve_app.openai_api.grammars import answer_grammar, answer_schema, tool_call_grammar
from serve_app.openai_api.params import GenerationParams
from serve_app.openai_api.probe_params import actions_of
from serve_app.openai_api.prompt import render
from serve_app.openai_api.reply_parser import Reasoning, reasoning_mode
from serve_app.openai_api.responses.from_chat import ResponsesReply
from serve_app.openai_api.responses.request import ResponsesRequest
from serve_app.openai_api.schemas import CaptureFields
from serve_app.openai_api.tokenize import bad_word_tokens, check_tokens
from serve_app.requests.generation import Choice, Runner
from serve_app.requests.probes_and_steering import (
    resolve_probes,
    resolve_steering,
    resolve_stopping,
    rules_of,
    steering_label,
    stopping_label,
)

BYTES_PER_VALUE = 12
"""Approximate size of a number in a JSON reply."""


@dataclass(frozen=True)
class GenerationPlan:
    """A planned request."""

    choices: list[Choice]
    """The generations."""
    reply: ChatReply | CompletionReply | ResponsesReply
    """Converts the events of the choices to the reply."""
    asked: ActivationRequest | None
    """The request for activations; None to capture nothing."""
    legacy_keys: dict[str, str]
    """The reply's names of stored keys, for requests by `collect_activations`; else empty."""


def plan_chat(served: Runner, request: ChatRequest, config: ServerConfig) -> GenerationPlan:
    """Render a conversation and plan its choices.

    Raises:
        RequestError: if the request cannot be carried out.
    """
    _check_capture(request, config)
    model = served.model
    tools = request.tools if request.calls_tools else []
    effort = effort_variables(model.tokenizer, request.reasoning_effort, model.source.name)
    rendered = render(
        model.tokenizer,
        request.messages,
        model.source.name,
        tools=tools,
        template_kwargs={**effort, **request.chat_template_kwargs},
        ending=request.ending,
        add_special_tokens=request.add_special_tokens,
    )
    check_tokens(rendered.prompt.token_ids, model.n_embeddings, "messages")
    keep = _kept_tokens(served, request, request.token_limit)
    prompt = rendered.prompt if keep is None else cut_prompt(rendered.prompt, keep, request.truncation_side)
    max_tokens = _max_tokens(served, prompt, request.token_limit, "messages")
    probes, stopping, stop_label = _probes(model, request, config)
    steering = resolve_steering(model, request.steering, config.probes)
    cut = rendered.prompt.n_prompt - prompt.n_prompt if request.truncation_side == "left" else 0
    first = max(rendered.turn_start - cut, 0) if request.capture and request.capture.since == "turn" else 0
    asked, capture, legacy_keys = _capture(served, request, prompt, max_tokens, config, steering, first=first)
    template = model.tokenizer.chat_template
    prefill = request.messages[-1].content if request.continue_final_message else ""
    reasoning = reasoning_mode(template if isinstance(template, str) else str(template), prompt.text, prefill)
    grammar = _grammar(request, reasoning)
    bad_words = _check_named_tokens(model, request)
    choices = [
        Choice(
            prompt=prompt,
            sampling=request.sampling(max_tokens, number, request.top_logprobs, bad_words),
            role=ASSISTANT,
            asked=_numbered(asked, number),
            plan=capture,
            grammar=grammar,
            score_tokens=request.logprobs,
            score_prompt=request.prompt_logprobs is not None and number == 0,  # all choices share the prompt
            probes=probes,
            stopping=stopping,
            stop_label=stop_label,
            steering=steering,
            cache_salt=request.cache_salt,
        )
        for number in range(request.n)
    ]
    request_id = f"chatcmpl-{str(ULID()).lower()}"
    reply = ChatReply(request, request_id, model.tokenizer, reasoning, prompt.n_prompt, probes, prompt.token_ids)
    return GenerationPlan(choices, reply, asked, legacy_keys)


def plan_response(served: Runner, request: ResponsesRequest, config: ServerConfig) -> GenerationPlan:
    """Plan a response, as the chat that it wraps.

    Raises:
        RequestError: if the request cannot be carried out.
    """
    plan = plan_chat(served, request.chat, config)
    assert isinstance(plan.reply, ChatReply)
    return replace(plan, reply=ResponsesReply(request, plan.reply))


def _grammar(request: ChatRequest, reasoning: Reasoning) -> Grammar | None:
    """Return the grammar that a reply must follow; None for free text."""
    answer = answer_schema(request.response_format)
    if request.calls_tools:
        choice = request.tool_choice or "auto"
        return tool_call_grammar(request.tools, choice, request.parallel_tool_calls, answer=answer, reasoning=reasoning)
    if request.structured is not None:
        param, outputs = request.structured
        return outputs.to_grammar(param, reasoning=reasoning)
    return None if answer is None else answer_grammar(answer, reasoning=reasoning)


def plan_completion(served: Runner, request: CompletionRequest, config: ServerConfig) -> GenerationPlan:
    """Tokenize raw prompts and plan their choices.

    Raises:
        RequestError: if the request cannot be carried out.
    """
    _check_capture(request, config)
    tokenizer = served.model.tokenizer
    prompts = [
        raw_prompt(
            tokenizer,
            prompt,
            add_special_tokens=request.add_special_tokens,
            n_embeddings=served.model.n_embeddings,
        )
        for prompt in request.prompts
    ]
    keep = _kept_tokens(served, request, request.max_tokens)
    if keep is not None:
        prompts = [raw.cut(keep, request.truncation_side) for raw in prompts]
    asked_for = request.capture
    probes, stopping, stop_label = _probes(served.model, request, config)
    steering = resolve_steering(served.model, request.steering, config.probes)
    if request.structured and (
        closing := [param for rule, param in rules_of(request.probes) if rule.when.then != "stop"]
    ):
        raise refused(f"{closing[0]}.then", "a completion with a grammar has no reasoning to close")
    grammar = request.structured[1].to_grammar(request.structured[0]) if request.structured else None
    bad_words = _check_named_tokens(served.model, request)
    choices: list[Choice] = []
    legacy_keys: dict[str, str] = {}
    for prompt in (raw.prompt for raw in prompts):
        max_tokens = _max_tokens(served, prompt, request.max_tokens, "prompt")
        asked, capture, legacy_keys = _capture(served, request, prompt, max_tokens, config, steering)
        before = len(choices)
        choices += [
            Choice(
                prompt=prompt,
                sampling=request.sampling(max_tokens, number, request.logprobs or 0, bad_words),
                role=COMPLETION,
                asked=_numbered(asked, before + number),
                plan=capture,
                grammar=grammar,
                score_tokens=request.logprobs is not None,
                score_prompt=(request.echo and request.logprobs is not None) or request.prompt_logprobs is not None,
                probes=probes,
                stopping=stopping,
                stop_label=stop_label,
                steering=steering,
                cache_salt=request.cache_salt,
            )
            for number in range(request.n)
        ]
    reply = CompletionReply(request, f"cmpl-{str(ULID()).lower()}", tokenizer, prompts, served.model.markers, probes)
    return GenerationPlan(choices, reply, asked_for, legacy_keys)


def _probes(
    model: ServedModel, request: GenerationParams, config: ServerConfig
) -> tuple[tuple[RequestProbe, ...], Stopping | None, Callable[[Sequence[Acted]], str] | None]:
    """Return a request's probes, the actions of their scores, and the function that formats the stop label."""
    probes = resolve_probes(model, request.probes, config.probes)
    stopping = resolve_stopping(model, rules_of(request.probes), probes, request.min_tokens)
    return probes, stopping, partial(stopping_label, request.probes, probes) if stopping is not None else None


def _numbered(asked: ActivationRequest | None, number: int) -> ActivationRequest | None:
    """Return the capture request of the `number`-th choice: with a rollout key, each choice is a separate turn."""
    if asked is None or asked.key is None or number == 0:
        return asked
    return asked.model_copy(update={"key": asked.key.model_copy(update={"turn": asked.key.turn + number})})


def describe_all(plan: GenerationPlan, dones: Sequence[Done]) -> CaptureFields:
    """Return the reply's `activations`, if they were requested."""
    if plan.asked is None:
        return {}
    rollouts = []
    for done in dones:
        assert done.stored is not None
        described = dict(done.stored.reply)
        if done.finished.acted:
            described["acted"] = [one.model_dump() for one in actions_of(plan.choices[0].probes, done.finished.acted)]
        if plan.legacy_keys:
            described["tensors"] = {plan.legacy_keys[key]: value for key, value in described["tensors"].items()}
        rollouts.append(described)
    if len(plan.choices) == 1:
        return {"activations": rollouts[0]}
    chosen = [{"choice_index": index, **rollout} for index, rollout in enumerate(rollouts)]
    return {"activations": {"session_id": chosen[0]["session_id"], "rollouts": chosen}}


def _kept_tokens(served: Runner, request: GenerationParams, limit: int | None) -> int | None:
    """Return how many tokens of a prompt to keep, None for all; -1 keeps as many as fit with the completion."""
    keep = request.truncate_prompt_tokens
    # If none fits, keep one; the request is then refused as too long.
    return max(_context(served) - (1 if limit is None else limit), 1) if keep == -1 else keep


def _check_named_tokens(model: ServedModel, request: GenerationParams) -> tuple[tuple[int, ...], ...]:
    """Check the token ids in a request; return the token ids of its `bad_words`.

    Raises:
        ApiError: if a token id is out of range.
    """
    for param in ("logit_bias", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        check_tokens(list(getattr(request, param) or ()), model.vocab_size, param)
    return bad_word_tokens(model.tokenizer, request.bad_words)


def _context(served: Runner) -> int:
    return min(served.model.context_length or UNBOUNDED, served.engine.max_model_len)


def _max_tokens(served: Runner, prompt: TokenizedText, limit: int | None, param: str) -> int:
    """Return the maximum number of tokens of a completion.

    Raises:
        ApiError: if prompt and completion do not fit into the context.
    """
    context = _context(served)
    left = context - prompt.n_prompt
    if left < (1 if limit is None else limit):
        n_prompt = prompt.n_prompt
        taken = f"your {param} resulted in {n_prompt} tokens"
        if limit:
            taken = f"you requested {n_prompt + limit} tokens ({n_prompt} in the {param}, {limit} in the completion)"
        # OpenAI's wording, which clients recognize (litellm's ContextWindowExceededError, inspect_ai's model_length).
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, {taken}. Please reduce the length of the "
            f"{param}{' or completion' if limit else ''}.",
            param=param,
            code="context_length_exceeded",
        )
    return left if limit is None else limit


def _capture(
    served: Runner,
    request: GenerationParams,
    prompt: TokenizedText,
    max_tokens: int,
    config: ServerConfig,
    steering: tuple[SteeringVector, ...],
    first: int = 0,
) -> tuple[ActivationRequest | None, CapturePlan | None, dict[str, str]]:
    """Resolve a request's activations; return the request with its steering label, the plan and the reply's legacy keys."""
    asked = request.capture
    if asked is None:
        return None, None, {}
    taps = served.model.structure.resolve(asked)
    names = {
        key: name
        for name in asked.hook_points
        for key in served.model.structure.resolve(asked.model_copy(update={"hook_points": (name,)}))
    }
    if not taps:
        raise refused("activations.layers", "the list is empty, so there is nothing to capture")
    plan = CapturePlan(taps, Positions.parse(asked.positions), captured_as(asked.dtype), first=first)
    if asked.delivery != "reference":
        _check_inline(served, asked, plan, prompt.n_prompt, max_tokens, config)
    legacy_keys = {key: legacy_key(key, name) for key, name in names.items()} if request.collect_activations else {}
    if steering:
        labels = {**asked.labels, STEERING_LABEL: steering_label(request.steering, steering)}
        asked = asked.model_copy(update={"labels": labels})
    return asked, plan, legacy_keys


def _check_inline(
    served: Runner,
    asked: ActivationRequest,
    plan: CapturePlan,
    n_prompt: int,
    max_tokens: int,
    config: ServerConfig,
) -> None:
    """Refuse a request whose reply would contain too many values, before anything is generated."""
    n_rows = plan.count(n_prompt, count_rows(n_prompt, max_tokens))
    per_row = SAMPLED_FEATURES if asked.delivery == "sample" else served.model.structure.d_model
    size = prod((n_rows, len(plan.taps), per_row, BYTES_PER_VALUE))
    if size > config.max_inline_bytes:
        raise refused(
            "activations.return",
            f"{asked.delivery!r} may send about {size / 1e6:,.0f} MB ({n_rows} rows of {len(plan.taps)} keys); the limit is "
            f"{config.max_inline_bytes / 1e6:,.0f} MB. Request fewer rows, keys or max_tokens, or request a reference and read "
            "the rows from the store",
            "reply_too_large",
        )


def _check_capture(request: GenerationParams, config: ServerConfig) -> None:
    """Refuse capture, steering and probes on a server without capture."""
    asked = {"activations": request.capture, "steering": request.steering, "probes": request.probes}
    for param, value in asked.items():
        if value and not config.capture:
            raise refused(param, "this server was started without capture (--no-capture)", "no_capture")
