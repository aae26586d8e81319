"""What every engine does, each checked against transformers alone: tokens, endings, log-probabilities, rows.

Where vLLM is installed (`make test-vllm`), all of it runs on vLLM too.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from roentgen.contract import ActivationRequest, Positions, split_key, stored_key
from roentgen.linear_probe import LinearProbe
from roentgen.stop_rule import ReasoningTokens, StopWhen, find_stop
from serve_app.capture.probe_scores import RequestProbe, UnscorableError
from serve_app.capture.rows import CapturePlan, UncapturableError
from serve_app.capture.steering import SteeringVector
from serve_app.capture.structure import CaptureRequestError
from serve_app.engines.constraints import Grammar, Schema
from serve_app.engines.probe_stopping import Stopping, StopRule
from serve_app.engines.protocol import (
    EngineBusyError,
    EngineStoppedError,
    Failed,
    Finished,
    RequestTooLargeError,
    Sampling,
    TextDelta,
)
from serve_app.openai_api.grammars import answer_schema, tool_call_grammar
from serve_app.openai_api.messages import ResponseFormat, Tool
from serve_app.openai_api.structured_outputs import StructuredOutputs
from tests.serve_app.alone import LLAMA_MODULES
from tests.serve_app.engines.subjects import ENGINES, Subject, subject
from tests.serve_app.tiny import Call, run

PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16, 17, 18], [40], [3, 1, 4, 1, 5, 9]]
LONG = [[(7 * i + j) % 250 for j in range(n)] for i, n in enumerate((3, 25, 9, 1, 40, 6, 2, 17))]
GREEDY = Sampling(max_tokens=12, temperature=0)
ASCII = replace(GREEDY, logit_bias=dict.fromkeys(range(94, 257), -100.0))
"""Every token is a letter, and none ends the text."""
CARDINAL = 'start: way "th"\nway: "nor" | "sou"'
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "ln_attn", "ln_mlp")


@pytest.fixture(scope="module", params=ENGINES)
def under_test(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with subject(request.param, tmp_path_factory.mktemp(request.param)) as started:
        yield started


def plan(subject: Subject, *hook_points: str, layers: object = "all", positions: str = "all") -> CapturePlan:
    asked = ActivationRequest(layers=layers, hook_points=hook_points)
    return CapturePlan(subject.model.structure.resolve(asked), Positions.parse(positions), "model")


def forward(subject: Subject, tokens: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run tokens alone through plain transformers; log-probabilities, and every hook point by plain hooks."""
    seen: dict[str, torch.Tensor] = {}
    root, handles = subject.reference, []
    places = {
        stored_key(name, i): (f"model.layers.{i}{path}", side)
        for i in range(3)
        for name, (path, side) in LLAMA_MODULES.items()
    }
    places |= {"embed": ("model.embed_tokens", "output"), "final_norm": ("model.norm", "output")}
    for key, (path, side) in places.items():

        def hook(module, args, kwargs, output, key=key, side=side):  # type: ignore[no-untyped-def]
            value = output if side == "output" else (args[0] if args else kwargs["hidden_states"])
            seen[key] = (value[0] if isinstance(value, tuple) else value)[0].clone()

        handles.append(root.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    with torch.inference_mode():
        logits = root(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits.log_softmax(-1), seen


def assert_rows(rows: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, values in rows.items():
        error = (values - expected[key]).norm(dim=1) / expected[key].norm(dim=1)
        assert error.max() <= 1e-4, f"{key}: {error.max()}"


def captured(subject: Subject, asked: CapturePlan) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Capture long prompts together; yields the tokens that each fed to the model, and its rows, one per token in order."""
    calls = [Call(p, Sampling(max_tokens=2 + 3 * i, temperature=0), asked) for i, p in enumerate(LONG)]
    run(subject.engine, calls)
    for call in calls:
        fed = call.job.prompt_ids + call.result().token_ids[:-1]
        positions, rows = subject.rows(call)
        assert positions == list(range(len(fed)))
        assert rows.keys() == asked.taps.keys()
        yield fed, rows


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_greedy_batches_equal_generate_alone(under_test: Subject) -> None:
    results = run(under_test.engine, [Call(prompt, GREEDY) for prompt in LONG])
    assert [r.token_ids for r in results] == [under_test.alone(prompt, 12) for prompt in LONG]


def test_rows_of_every_hook_point_equal_a_teacher_forced_forward(under_test: Subject) -> None:
    for fed, rows in captured(under_test, plan(under_test, *STREAM, "embed", "final_norm")):
        assert len(rows) == 3 * len(STREAM) + 2
        assert_rows(rows, forward(under_test, fed)[1])


POLICIES = ("all", "prompt", "generated", "last_prompt", "last", "stride:3", "mean_prompt", "mean_generated")


@pytest.mark.parametrize("ending", ["length", "stop token", "stop string"])
def test_every_policy_keeps_the_same_rows_however_a_completion_ends(under_test: Subject, ending: str) -> None:
    """A stop string is found where text is made, when the model may have gone on already."""
    prompt = PROMPTS[1]
    (unended,) = run(under_test.engine, [Call(prompt, ASCII)])
    free, text = unended.token_ids, unended.text
    end = {"length": {}, "stop token": {"stop_token_ids": frozenset({free[5]})}, "stop string": {"stop": (text[3:6],)}}
    sampling = replace(ASCII, **end[ending])
    calls = [Call(prompt, sampling, plan(under_test, "resid_post", layers=(1,), positions=p)) for p in POLICIES]
    run(under_test.engine, calls)
    for policy, call in zip(POLICIES, calls, strict=True):
        said = call.result()
        assert said.token_ids == free[: len(said.token_ids)]
        assert said.finish_reason == ("length" if ending == "length" else "stop")
        fed = prompt + said.token_ids[:-1]
        whole = forward(under_test, fed)[1]["layers.1.resid_post"]
        wanted = Positions.parse(policy).select(len(prompt), len(fed))
        expected = whole[list(wanted)]
        if policy.startswith("mean"):
            expected, wanted = expected.mean(0, keepdim=True)[: len(wanted)], [-1] * bool(wanted)
        positions, rows = under_test.rows(call)
        assert positions == list(wanted), policy
        torch.testing.assert_close(rows["layers.1.resid_post"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("max_tokens", "rows"), [(0, 3), (1, 3), (2, 4), (12, 14)])
def test_row_counts(under_test: Subject, max_tokens: int, rows: int) -> None:
    """N tokens take N forwards; the last one sampled never passes through the model."""
    sampling = replace(ASCII, max_tokens=max_tokens)
    call = Call(PROMPTS[0], sampling, plan(under_test, "resid_post", layers=(1,)))
    (result,) = run(under_test.engine, [call])
    assert (len(result.token_ids), result.finish_reason) == (max_tokens, "length")
    assert under_test.rows(call)[0] == list(range(rows))


def test_a_policy_that_selects_nothing_gives_no_rows(under_test: Subject) -> None:
    for policy in ("generated", "mean_generated"):
        call = Call(
            PROMPTS[0], Sampling(1, temperature=0), plan(under_test, "resid_post", layers=(1,), positions=policy)
        )
        run(under_test.engine, [call])
        positions, rows = under_test.rows(call)
        assert positions == []
        assert rows["layers.1.resid_post"].shape == (0, 64)


def test_streamed_pieces_join_to_the_text(under_test: Subject) -> None:
    calls = [Call(prompt, GREEDY, stream=True) for prompt in PROMPTS]
    for call, result in zip(calls, run(under_test.engine, calls), strict=True):
        deltas = [event for event in call.events if isinstance(event, TextDelta)]
        assert "".join(delta.text for delta in deltas) == result.text
        spoken = len(result.token_ids) - (result.ended_by is not None)
        assert [token for delta in deltas for token in delta.token_ids] == result.token_ids[:spoken]


def test_a_stop_string_ends_a_generation_and_is_not_in_the_text(under_test: Subject) -> None:
    (free,) = run(under_test.engine, [Call(PROMPTS[1], ASCII)])
    stop = free.text[3:6]
    call = Call(PROMPTS[1], replace(ASCII, stop=(stop,)), stream=True)
    (result,) = run(under_test.engine, [call])
    assert result.finish_reason == "stop"
    assert result.text == free.text[: free.text.find(stop)]
    assert "".join(e.text for e in call.events if isinstance(e, TextDelta)) == result.text


def test_a_seed_gives_the_same_tokens_in_any_company(under_test: Subject) -> None:
    hot = Sampling(max_tokens=12, temperature=1.0, seed=7)
    (alone,) = run(under_test.engine, [Call(PROMPTS[1], hot)])
    others = [Call(PROMPTS[0], Sampling(12, seed=1)), Call(PROMPTS[2], Sampling(3, seed=7))]
    together = run(under_test.engine, [others[0], Call(PROMPTS[1], hot), others[1]])
    assert together[1].token_ids == alone.token_ids
    assert run(under_test.engine, [Call(PROMPTS[1], Sampling(12, seed=8))])[0].token_ids != alone.token_ids


def test_logprobs_are_the_models_own(under_test: Subject) -> None:
    sampling = Sampling(6, temperature=0.5, seed=3, top_logprobs=4, logit_bias={7: 5.0})
    (result,) = run(under_test.engine, [Call(PROMPTS[0], sampling)])
    logprobs, _ = forward(under_test, PROMPTS[0] + result.token_ids)
    for at, (token, score) in enumerate(zip(result.token_ids, result.scores, strict=True), start=2):
        values, order = logprobs[at].topk(4)
        assert score.logprob == pytest.approx(logprobs[at, token].item(), rel=1e-4, abs=1e-4)
        assert [token for token, _ in score.top] == order.tolist()
        torch.testing.assert_close(torch.tensor([p for _, p in score.top]), values, rtol=1e-4, atol=1e-4)


def test_tokens_are_scored_for_those_who_ask(under_test: Subject) -> None:
    def calls(*scored: bool) -> list[Call]:
        samplings = [GREEDY, replace(GREEDY, top_logprobs=1), replace(GREEDY, logprob_token_ids=(7,)), GREEDY]
        return [
            Call(prompt, sampling, stream=True, score_tokens=one)
            for prompt, sampling, one in zip(PROMPTS, samplings, scored, strict=True)
        ]

    alike = run(under_test.engine, calls(True, True, True, True))
    mixed = run(under_test.engine, calls(False, True, True, True))
    silent = run(under_test.engine, calls(False, False, False, False))
    for name, results in (("mixed", mixed), ("silent", silent)):
        assert [one.token_ids for one in results] == [one.token_ids for one in alike], name
        assert [one.text for one in results] == [one.text for one in alike], name
    assert [one.scores for one in silent] == [[]] * 4
    assert mixed[0].scores == []
    for one, whole in zip(mixed[1:], alike[1:], strict=True):
        assert [score.logprob for score in one.scores] == pytest.approx(
            [score.logprob for score in whole.scores], abs=1e-5
        )
        assert [len(score.top) for score in one.scores] == [len(score.top) for score in whole.scores]


def test_penalised_greedy_tokens_are_those_of_generate(under_test: Subject) -> None:
    long = replace(GREEDY, max_tokens=60)
    plain = under_test.alone(PROMPTS[1], 60)
    banned = dict.fromkeys(plain, -100.0)
    penalized, biased = run(
        under_test.engine,
        [Call(PROMPTS[1], replace(long, repetition_penalty=3.0)), Call(PROMPTS[1], replace(long, logit_bias=banned))],
    )
    assert penalized.token_ids == under_test.alone(PROMPTS[1], 60, repetition_penalty=3.0)
    assert penalized.token_ids != plain
    assert biased.token_ids == under_test.alone(PROMPTS[1], 60, bad_words_ids=[[token] for token in banned])


def test_bad_words_are_left_out_as_generate_leaves_them_out(under_test: Subject) -> None:
    plain = under_test.alone(PROMPTS[1], 40)
    words = (tuple(plain[3:5]), tuple(plain[6:7]), tuple(plain[8:11]))
    (said,) = run(under_test.engine, [Call(PROMPTS[1], replace(GREEDY, max_tokens=40, bad_words=words))])
    assert said.token_ids == under_test.alone(PROMPTS[1], 40, bad_words_ids=[list(word) for word in words])
    assert said.token_ids != plain


def test_only_allowed_tokens_come(under_test: Subject) -> None:
    few = replace(GREEDY, allowed_token_ids=(70, 80, 90))
    greedy, drawn = run(
        under_test.engine, [Call(PROMPTS[1], few), Call(PROMPTS[1], replace(few, temperature=2, seed=1))]
    )
    logprobs, _ = forward(under_test, PROMPTS[1] + greedy.token_ids)
    best = logprobs[len(PROMPTS[1]) - 1 : -1, [70, 80, 90]].argmax(-1)
    assert greedy.token_ids == [(70, 80, 90)[place] for place in best.tolist()]
    assert set(drawn.token_ids) <= {70, 80, 90}
    assert len(set(drawn.token_ids)) > 1


def test_a_least_probability_leaves_out_what_is_less_likely(under_test: Subject) -> None:
    hot = Sampling(60, temperature=1.5, seed=4, logit_bias={256: -100.0})
    cut, free = run(under_test.engine, [Call(PROMPTS[1], replace(hot, min_p=0.75)), Call(PROMPTS[1], hot)])
    for result, least in ((cut, True), (free, False)):
        logprobs, _ = forward(under_test, PROMPTS[1] + result.token_ids)
        at = logprobs[len(PROMPTS[1]) - 1 : -1] / hot.temperature
        share = (at.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0] - at.max(-1).values).exp()
        assert bool(share.min() >= 0.75 - 1e-4) is least


def test_the_models_own_end_is_ignored_if_it_is_to_be(under_test: Subject) -> None:
    (end,) = under_test.model.eos_token_ids
    wanted = replace(GREEDY, logit_bias={end: 100.0})
    ended, going_on = run(
        under_test.engine, [Call(PROMPTS[1], wanted), Call(PROMPTS[1], replace(wanted, ignore_eos=True))]
    )
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([end], "stop", None)
    assert (going_on.token_ids, going_on.finish_reason, going_on.text) == ([end] * 12, "length", "")


def test_what_ended_it_is_told_and_is_text_if_it_is_to_be(under_test: Subject) -> None:
    (free,) = run(under_test.engine, [Call(PROMPTS[1], ASCII)])
    stop, token = free.text[3:6], free.token_ids[5]
    by_text = replace(ASCII, stop=("no such thing", stop))
    by_token = replace(ASCII, stop_token_ids=frozenset({token}))
    asked = [by_text, replace(by_text, include_stop=True), by_token, replace(by_token, include_stop=True)]
    calls = [Call(PROMPTS[1], sampling, stream=True) for sampling in asked]
    results = run(under_test.engine, calls)
    at, first = free.text.find(stop), free.token_ids.index(token)
    assert [result.text for result in results] == [
        free.text[:at], free.text[: at + 3], free.text[:first], free.text[: first + 1],
    ]  # fmt: skip
    assert [result.stop_reason for result in results] == [stop, stop, token, token]
    for call, result in zip(calls, results, strict=True):
        assert "".join(event.text for event in call.events if isinstance(event, TextDelta)) == result.text


def test_named_tokens_are_scored_beside_the_one_that_came(under_test: Subject) -> None:
    sampling = Sampling(4, temperature=0, logprob_token_ids=(7, 250, 90))
    (result,) = run(under_test.engine, [Call(PROMPTS[0], sampling)])
    logprobs, _ = forward(under_test, PROMPTS[0] + result.token_ids)
    for at, (token, score) in enumerate(zip(result.token_ids, result.scores, strict=True), start=2):
        assert [named for named, _ in score.top] == list(dict.fromkeys((token, 7, 250, 90)))
        for named, value in score.top:
            assert value == pytest.approx(logprobs[at, named].item(), rel=1e-4, abs=1e-4)


def test_a_prompts_tokens_have_ranks(under_test: Subject) -> None:
    call = Call(PROMPTS[1], Sampling(1, temperature=0, prompt_logprobs=3))
    call.job = replace(call.job, score_prompt=True)
    (result,) = run(under_test.engine, [call])
    logprobs, _ = forward(under_test, PROMPTS[1])
    assert result.prompt_scores is not None
    for at, (token, score) in enumerate(zip(PROMPTS[1][1:], result.prompt_scores, strict=True)):
        assert score.rank == 1 + logprobs[at].argsort(descending=True).tolist().index(token)
        assert [other for other, _ in score.top] == logprobs[at].topk(3).indices.tolist()


def test_a_stop_token_ends_it_and_is_no_text(under_test: Subject) -> None:
    expected = under_test.alone(PROMPTS[1], 12)
    (result,) = run(under_test.engine, [Call(PROMPTS[1], replace(GREEDY, stop_token_ids=frozenset({expected[5]})))])
    stop = expected.index(expected[5])
    assert result.token_ids == expected[: stop + 1]
    assert (result.finish_reason, result.ended_by) == ("stop", expected[5])
    assert result.text == under_test.model.tokenizer.decode(expected[:stop])


def test_the_least_length_holds_back_stop_tokens_and_stop_strings(under_test: Subject) -> None:
    expected = under_test.alone(PROMPTS[1], 40)
    first = frozenset(expected[:1])
    letter = under_test.model.tokenizer.decode(expected[:1])
    stopped, held, held_text = run(
        under_test.engine,
        [
            Call(PROMPTS[1], replace(GREEDY, stop_token_ids=first)),
            Call(PROMPTS[1], replace(GREEDY, stop_token_ids=first, min_tokens=6)),
            Call(PROMPTS[1], replace(GREEDY, stop=(letter,), min_tokens=4)),
        ],
    )
    assert len(stopped.token_ids) == 1
    assert len(held.token_ids) >= 6
    assert len(held_text.token_ids) >= 4


def test_a_prompt_is_only_read_and_scored(under_test: Subject) -> None:
    calls = [Call(p, Sampling(0, top_logprobs=1), plan(under_test, "resid_post", layers=(1,))) for p in PROMPTS]
    for call in calls:
        call.job = replace(call.job, score_prompt=True)
    for call, result in zip(calls, run(under_test.engine, calls), strict=True):
        prompt = call.job.prompt_ids
        assert (result.token_ids, result.text, result.finish_reason) == ([], "", "length")
        logprobs, expected = forward(under_test, prompt)
        wanted = logprobs[:-1].gather(1, torch.tensor(prompt[1:], dtype=torch.long)[:, None])[:, 0]
        assert result.prompt_scores is not None
        found = torch.tensor([score.logprob for score in result.prompt_scores])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert [score.top[0][0] for score in result.prompt_scores] == logprobs[:-1].argmax(-1).tolist()
        assert_rows(under_test.rows(call)[1], expected)


def test_a_grammar_is_followed(under_test: Subject) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["n"],
    }
    grammar = Grammar("start: json", {"json": Schema({**schema, "additionalProperties": False}, "x", strict=True)})
    call = Call(PROMPTS[1], Sampling(40, seed=5))
    call.job = replace(call.job, constraint=under_test.model.constraints.compile(grammar))
    (result,) = run(under_test.engine, [call])
    assert result.finish_reason == "stop"
    assert 0 <= json.loads(result.text)["n"] <= 99


def test_calls_or_else_an_answer_in_the_form_asked_for(under_test: Subject) -> None:
    number = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": number}})
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": number}}
    answer = answer_schema(ResponseFormat.model_validate(shape))
    constraints = under_test.model.constraints
    grammar = tool_call_grammar([tool], "auto", False, answer=answer)
    calls = [Call(PROMPTS[1], Sampling(90, seed=seed, temperature=2)) for seed in range(8)]
    for call in calls:
        call.job = replace(call.job, constraint=constraints.compile(grammar))
    texts = [result.text for result in run(under_test.engine, calls)]
    called = [
        re.fullmatch(r'<tool_call>\n\{"name": "f", "arguments": (\{"n": \d\})\}\n</tool_call>', text) for text in texts
    ]
    assert 0 < sum(found is not None for found in called) < len(texts)  # a random model takes either way
    for text, found in zip(texts, called, strict=True):
        assert 0 <= json.loads(found[1] if found else text)["n"] <= 9


@pytest.mark.parametrize("outputs", [{"choice": ["north", "south"]}, {"regex": "(north|south)"}, {"grammar": CARDINAL}])
def test_structured_outputs_are_followed(under_test: Subject, outputs: dict[str, object]) -> None:
    grammar = StructuredOutputs.model_validate(outputs).to_grammar("x")
    calls = [Call(PROMPTS[1], Sampling(9, seed=seed)) for seed in range(8)]
    for call in calls:
        call.job = replace(call.job, constraint=under_test.model.constraints.compile(grammar))
    results = run(under_test.engine, calls)
    assert {result.text for result in results} == {"north", "south"}
    assert {result.finish_reason for result in results} == {"stop"}


@pytest.mark.parametrize("hook_point", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_a_request_is_steered_and_its_company_is_not(under_test: Subject, hook_point: str) -> None:
    vector = 0.7 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    ((key, tap),) = plan(under_test, hook_point, layers=(1,)).taps.items()
    asked = plan(under_test, "resid_post")
    steered, other = Call(PROMPTS[1], GREEDY, asked), Call(PROMPTS[3], GREEDY, asked)
    steered.job = replace(steered.job, steering=(SteeringVector(key, tap, vector, Positions("generated")),))
    run(under_test.engine, [steered, other])
    path, side = LLAMA_MODULES[hook_point]
    module = under_test.reference.get_submodule(f"model.layers.1{path}")
    fed = PROMPTS[1] + steered.result().token_ids[:-1]
    steering_vector = torch.zeros(1, len(fed), 64)
    steering_vector[:, len(PROMPTS[1]) :] = vector

    def before(module, args):  # type: ignore[no-untyped-def]
        args[0].add_(steering_vector)  # in place: the norm and the sum around it are given one tensor

    def after(module, args, output):  # type: ignore[no-untyped-def]
        return (output[0] + steering_vector, *output[1:]) if isinstance(output, tuple) else output + steering_vector

    handle = module.register_forward_pre_hook(before) if side == "input" else module.register_forward_hook(after)
    try:
        logprobs, expected = forward(under_test, fed)
    finally:
        handle.remove()
    assert_rows(under_test.rows(steered)[1], expected)
    assert steered.result().token_ids == logprobs[len(PROMPTS[1]) - 1 :].argmax(-1).tolist()
    assert other.result().token_ids == under_test.alone(PROMPTS[3], 12)


def test_a_cancelled_job_leaves_and_the_others_go_on(under_test: Subject) -> None:
    gone = Call(PROMPTS[0], Sampling(100, temperature=0, min_tokens=100), plan(under_test, "resid_post"), stream=True)
    stays = Call(PROMPTS[1], GREEDY, plan(under_test, "resid_post", layers=(0,)))
    for call in (gone, stays):
        under_test.engine.submit(call.job)
    wait_for(lambda: bool(gone.events))
    gone.job.cancelled.set()
    assert stays.result().token_ids == under_test.alone(PROMPTS[1], 12)
    under_test.rows(stays)
    wait_for(lambda: under_test.engine.load.running == 0)
    assert all(isinstance(event, TextDelta | Finished) for event in gone.events)


def test_a_hook_point_without_rows_is_refused_or_fails_alone(under_test: Subject) -> None:
    """A list of layers never runs, so it has no row per token to keep; and no graph has a tap there."""
    if under_test.model.structure.tapped is not None:
        with pytest.raises(
            CaptureRequestError,
            match=r"model\.layers\.output: this server has no tap there; start it with --taps default and",
        ):
            plan(under_test, "resid_post", "model.layers.output")
        return
    odd = Call(PROMPTS[0], GREEDY, plan(under_test, "resid_post", "model.layers.output"))
    fine = Call(PROMPTS[1], GREEDY, plan(under_test, "resid_post"))
    for call in (odd, fine):
        under_test.engine.submit(call.job)
    assert len(under_test.rows(fine)[0]) == 20
    with pytest.raises(UncapturableError, match=r"model\.layers\.output has no row per token"):
        under_test.rows(odd)


def scorer(subject: Subject, key: str, *, outputs: int = 1, seed: int = 0) -> RequestProbe:
    hook_point, layer = split_key(key)
    tap = plan(subject, hook_point, layers=(layer or 0,)).taps[key]
    width, generator = subject.model.structure.d_model, torch.Generator().manual_seed(seed)
    weight, mean = torch.randn(outputs, width, generator=generator), torch.randn(width, generator=generator)
    scale, bias = torch.rand(width, generator=generator) + 0.5, torch.randn(outputs, generator=generator)
    return RequestProbe(f"{key} {seed}", key, tap, LinearProbe(weight, bias, mean, scale), "label")


@pytest.mark.parametrize("steered", [False, True])
def test_rows_are_scored_as_they_are_captured(under_test: Subject, steered: bool) -> None:
    """Against the probe's formula in numpy on the rows that the store then has."""
    one = scorer(under_test, "layers.0.resid_post")
    asked = [
        (one,),
        (one, scorer(under_test, "layers.0.resid_post", outputs=3, seed=1)),
        (),
        (scorer(under_test, "embed"), one),
    ]
    vector = SteeringVector(one.key, one.tap, torch.ones(under_test.model.structure.d_model), Positions("all"))
    calls = [
        Call(p, replace(GREEDY, max_tokens=3 + 4 * i), plan(under_test, "resid_post", "embed"))
        for i, p in enumerate(PROMPTS)
    ]
    for call, probes in zip(calls, asked, strict=True):
        call.job = replace(call.job, probes=probes, steering=(vector,) if steered else ())
    for call, probes, result in zip(calls, asked, run(under_test.engine, calls), strict=True):
        rows = under_test.rows(call)[1]
        assert len(result.probed) == len(probes)
        for probe, scores in zip(probes, result.probed, strict=True):
            weight, bias, mean, scale = (
                getattr(probe.linear_probe, part).double().numpy() for part in ("weight", "bias", "mean", "scale")
            )
            expected = (rows[probe.key].double().numpy() - mean) / scale @ weight.T + bias
            assert scores.shape == expected.shape
            np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_streams_scores_join_to_the_whole(under_test: Subject) -> None:
    probes = (scorer(under_test, "layers.1.resid_post"), scorer(under_test, "layers.2.resid_pre", outputs=2))
    calls = [Call(p, Sampling(40, temperature=0, logit_bias=ASCII.logit_bias), stream=True) for p in PROMPTS]
    for call in calls:
        call.job = replace(call.job, probes=probes)
    for call, result in zip(calls, run(under_test.engine, calls), strict=True):
        pieces = [event.probed for event in call.events if isinstance(event, TextDelta) and event.probed]
        assert len(pieces) > 3
        for number, whole in enumerate(result.probed):
            told = torch.cat([piece[number] for piece in pieces])
            assert torch.equal(told, whole[: len(told)])
            assert len(whole) == len(call.job.prompt_ids) + 39


def test_a_probe_of_another_width_fails_alone(under_test: Subject) -> None:
    odd, fine = Call(PROMPTS[0], GREEDY), Call(PROMPTS[1], GREEDY)
    probe = scorer(under_test, "layers.1.resid_post")
    narrow = replace(probe, linear_probe=LinearProbe(torch.ones(1, 3), torch.ones(1), torch.ones(3), torch.ones(3)))
    odd.job, fine.job = replace(odd.job, probes=(narrow,)), replace(fine.job, probes=(probe,))
    for call in (odd, fine):
        under_test.engine.submit(call.job)
    assert len(fine.result().probed[0]) == 20
    with pytest.raises(UnscorableError, match="has no row of 3 values per token"):
        odd.result()


MARKS = ReasoningTokens(start=60, end=62)


def stopping(above: float, length: int, *, min_tokens: int = 0, **when: str) -> Stopping:
    rule = StopRule(0, StopWhen.model_validate({"above": above, "for": length, **when}))
    return Stopping((rule,), MARKS if rule.when.counts == "reasoning" else None, min_tokens)


def stored_scores(subject: Subject, call: Call, probe: RequestProbe) -> np.ndarray:
    """The scores of a stored rollout's rows, one for each token that was fed."""
    positions, rows = subject.rows(call)
    assert positions == list(range(len(positions)))
    return probe.linear_probe.scores(rows[probe.key])[:, 0].numpy()


@pytest.mark.rotating
def test_a_score_ends_a_generation_where_the_stored_scores_say(
    under_test: Subject, request: pytest.FixtureRequest
) -> None:
    """A hundred rollouts that stop, beside others that do not; a rule that is off by one token would stop elsewhere."""
    n = 100 if request.node.callspec.params["under_test"] in ("transformers", "vllm") else 20
    probe, asked = scorer(under_test, "layers.1.resid_post"), plan(under_test, "resid_post", layers=(1,))
    prompts = [[(11 * i + 3 * j) % 90 for j in range(1 + i % 7)] for i in range(n)]
    samplings = [replace(ASCII, max_tokens=16 + i % 9, temperature=float(i % 2), seed=i) for i in range(n)]
    whole = [Call(prompt, sampling, asked) for prompt, sampling in zip(prompts, samplings, strict=True)]
    for start in range(0, n, 25):
        run(under_test.engine, whole[start : start + 25])
    scores = [stored_scores(under_test, call, probe) for call in whole]
    above, length = float(np.quantile(np.concatenate(scores), 0.6)), 2
    live = [
        Call(prompt, sampling, asked if i % 2 else None, stream=i % 3 == 0)
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    neighbors = [Call(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
    for call in live:
        call.job = replace(call.job, probes=(probe,), stopping=stopping(above, length))
    for start in range(0, n, 10):
        some = slice(start, start + 10)
        run(under_test.engine, [call for pair in zip(live[some], neighbors[some], strict=True) for call in pair])
    stopped = shifted = 0
    for call, beside, before, found in zip(live, neighbors, whole, scores, strict=True):
        prompt, free, said = call.job.prompt_ids, before.result(), call.result()
        assert beside.result().token_ids == free.token_ids
        own = found[len(prompt) :]
        place, _ = find_stop(own, np.ones(len(own), dtype=bool), above, length)
        kept = free.token_ids if place is None else free.token_ids[: place + 1]
        assert said.token_ids == kept
        n_rows = len(prompt) + len(kept) - 1
        np.testing.assert_allclose(said.probed[0][:, 0].numpy(), found[:n_rows], rtol=1e-3, atol=1e-4)
        if call.job.capture is not None:
            assert under_test.rows(call)[0] == list(range(n_rows))
        if call.job.stream:
            deltas = [event for event in call.events if isinstance(event, TextDelta)]
            assert [token for delta in deltas for token in delta.token_ids] == kept[: len(kept)]
            assert sum(len(delta.probed[0]) for delta in deltas if delta.probed) <= n_rows
        if place is None:
            assert (said.finish_reason, said.stop_reason, said.acted) == (free.finish_reason, None, ())
            continue
        stopped += 1
        assert (said.finish_reason, said.stop_reason) == ("stop", f"probe:{probe.name}")
        (acted,) = said.acted
        assert (acted.probe, acted.then, acted.position) == (0, "stop", len(prompt) + place)
        assert acted.score == pytest.approx(own[place], rel=1e-3)
        assert free.text.startswith(said.text)
        # The control: scores that are one token late.
        late, _ = find_stop(np.roll(own, 1), np.arange(len(own)) > 0, above, length)
        shifted += late != place
    assert n / 2 < stopped < n
    assert shifted > n / 3


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_kept_of_a_generation_that_a_score_ends(under_test: Subject, policy: str) -> None:
    """The last token has passed through the model, and has no row all the same: rows are those of every other generation."""
    prompt, probe = PROMPTS[1], scorer(under_test, "layers.1.resid_post")
    call = Call(prompt, ASCII, plan(under_test, "resid_post", layers=(1,), positions=policy))
    call.job = replace(call.job, probes=(probe,), stopping=stopping(-1e9, 4))
    (said,) = run(under_test.engine, [call])
    assert len(said.token_ids) == 4
    fed = prompt + said.token_ids[:-1]
    wanted = list(Positions.parse(policy).select(len(prompt), len(fed)))
    expected = forward(under_test, fed)[1]["layers.1.resid_post"][wanted]
    if policy.startswith("mean"):
        expected, wanted = expected.mean(0, keepdim=True), [-1]
    positions, rows = under_test.rows(call)
    assert positions == wanted
    torch.testing.assert_close(rows["layers.1.resid_post"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("changed", "tokens", "reason"), [
    ({"min_tokens": 6}, 6, "stop"),
    ({"max_tokens": 3}, 3, "length"),
    ({"max_tokens": 4}, 4, "length"),
    ({"max_tokens": 5}, 4, "stop"),
    ({"ignore_eos": True}, 4, "stop"),
    ({"stop_token_ids": frozenset({93})}, 4, "stop"),
])  # fmt: skip
def test_a_score_beside_other_ends(under_test: Subject, changed: dict[str, object], tokens: int, reason: str) -> None:
    """A generation that ends by itself at the token is not ended by its score, which would come too late."""
    sampling, probe = replace(ASCII, **changed), scorer(under_test, "layers.1.resid_post")
    call, free = Call(PROMPTS[1], sampling), Call(PROMPTS[1], ASCII)
    rules = stopping(-1e9, 4, min_tokens=sampling.min_tokens)
    call.job = replace(call.job, probes=(probe,), stopping=rules)
    said, whole = run(under_test.engine, [call, free])
    assert said.token_ids == whole.token_ids[:tokens]
    assert said.finish_reason == reason
    assert bool(said.acted) == (reason == "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_score_closes_the_reasoning_and_the_model_goes_on(under_test: Subject, temperature: float) -> None:
    """The marker is forced; what follows equals the model's continuation of a prompt that ends with it."""
    probe = scorer(under_test, "layers.1.resid_post")
    prompt = [*PROMPTS[1], MARKS.start]
    sampling = replace(ASCII, max_tokens=14, temperature=temperature, seed=5, top_logprobs=2)
    calls = [
        Call(prompt, sampling, plan(under_test, "resid_post", layers=(1,)), stream=stream) for stream in (True, False)
    ]
    for call in calls:
        rules = stopping(-1e9, 5, then="close_reasoning")
        call.job = replace(call.job, probes=(probe,), stopping=rules)
    said, again = run(under_test.engine, [*calls, Call(prompt, sampling)])[:2]
    (free,) = run(under_test.engine, [Call(prompt, sampling)])
    assert said.token_ids == again.token_ids
    assert said.token_ids[:6] == [*free.token_ids[:5], MARKS.end]
    assert (said.finish_reason, said.stop_reason, len(said.token_ids)) == ("length", None, 14)
    assert [(acted.then, acted.position) for acted in said.acted] == [("close_reasoning", len(prompt) + 4)]
    assert [math.isnan(score.logprob) for score in said.scores] == [place == 5 for place in range(14)]
    assert said.scores[5].top == ()
    if not temperature:
        follows = Call(prompt + said.token_ids[:6], replace(sampling, max_tokens=8))
        assert run(under_test.engine, [follows])[0].token_ids == said.token_ids[6:]
    assert_rows(under_test.rows(calls[0])[1], forward(under_test, prompt + said.token_ids[:-1])[1])
    deltas = [event for event in calls[0].events if isinstance(event, TextDelta)]
    assert [token for delta in deltas for token in delta.token_ids] == said.token_ids


def test_only_the_reasoning_counts_where_that_is_asked_for(under_test: Subject) -> None:
    """A reply that has not begun to reason, or has ended it, is not closed; nor is a marker a thought."""
    probe = scorer(under_test, "layers.1.resid_post")
    thinks = replace(ASCII, max_tokens=8)
    calls = {
        "never": Call(PROMPTS[1], replace(thinks, logit_bias={**ASCII.logit_bias, MARKS.start: -100.0})),
        "before": Call([*PROMPTS[1], MARKS.start, 7, MARKS.end], replace(thinks, logit_bias=ASCII.logit_bias)),
        "ends": Call([*PROMPTS[1], MARKS.start], replace(thinks, allowed_token_ids=(MARKS.end,), logit_bias={})),
        "begins": Call(PROMPTS[1], replace(thinks, allowed_token_ids=(MARKS.start,), logit_bias={})),
    }
    for call in calls.values():
        rules = stopping(-1e9, 1, where="reasoning")
        call.job = replace(call.job, probes=(probe,), stopping=rules)
    run(under_test.engine, list(calls.values()))
    for name in ("never", "before", "ends"):
        assert calls[name].result().acted == (), name
    assert len(calls["begins"].result().token_ids) == 2  # the first opens the reasoning


def test_a_grammar_goes_on_behind_a_reasoning_that_a_score_closes(under_test: Subject) -> None:
    prompt, probe = [*PROMPTS[1], MARKS.start], scorer(under_test, "layers.1.resid_post")
    grammar = Grammar('start: /[^_]*/ "_" way\nway: "nor" | "sou"', source="structured_outputs.grammar")
    unlikely = {**ASCII.logit_bias, MARKS.end: -100.0}
    calls = [Call(prompt, replace(ASCII, max_tokens=20, logit_bias=unlikely)) for _ in range(2)]
    for call in calls:
        constraint = under_test.model.constraints.compile(grammar)
        call.job = replace(
            call.job, probes=(probe,), stopping=stopping(-1e9, 5, then="close_reasoning"), constraint=constraint
        )
    for said in run(under_test.engine, calls):
        assert said.token_ids[5] == MARKS.end
        assert said.text[5:] in ("_nor", "_sou")


def test_a_score_that_cannot_be_had_ends_nothing_else(under_test: Subject) -> None:
    odd, fine = Call(PROMPTS[0], GREEDY), Call(PROMPTS[1], GREEDY)
    probe = scorer(under_test, "layers.1.resid_post")
    width = under_test.model.structure.d_model
    endless = replace(
        probe,
        linear_probe=LinearProbe(
            torch.full((1, width), 3e38), torch.ones(1), torch.zeros(width), torch.full((width,), 1e-9)
        ),
    )
    odd.job = replace(odd.job, probes=(endless,), stopping=stopping(0, 1))
    fine.job = replace(fine.job, probes=(probe,), stopping=stopping(1e9, 1))
    for call in (odd, fine):
        under_test.engine.submit(call.job)
    assert fine.result().acted == ()
    with pytest.raises(UnscorableError, match="gives a score that is not finite"):
        odd.result()


BEGINNING = [(7 * i + i // 90) % 90 for i in range(300)]
"""Two of vLLM's blocks on a CPU, and a part of a third."""


def test_a_prompt_that_was_read_before_has_all_its_rows_and_scores(under_test: Subject) -> None:
    """All requests share a prefix; those of the second round run together and reuse what the first round has read."""
    probe = scorer(under_test, "layers.1.resid_post")
    asked = [
        *((policy, ()) for policy in POLICIES),
        *((policy, (probe,)) for policy in ("all", "last", "mean_prompt", "stride:3")),
    ]
    for together in (False, True):
        calls = []
        for number, (policy, probes) in enumerate(asked):
            kept = plan(under_test, "resid_post", "ln_mlp", layers=(0, 2), positions=policy)
            call = Call([*BEGINNING, 91, number], Sampling(4, temperature=0, min_tokens=4), kept)
            call.job = replace(call.job, probes=probes)
            calls.append(call)
        for some in [calls] if together else [[call] for call in calls]:
            run(under_test.engine, some)
        for (policy, _), call in zip(asked, calls, strict=True):
            said = call.result()
            if together:
                assert said.cached_tokens >= (256 if under_test.engine.prefix_cache.enabled else 0)
            fed = call.job.prompt_ids + said.token_ids[:-1]
            expected = forward(under_test, fed)[1]
            wanted = list(Positions.parse(policy).select(len(call.job.prompt_ids), len(fed)))
            positions, rows = under_test.rows(call)
            kept = {key: expected[key][wanted] for key in rows}
            if policy.startswith("mean"):
                wanted, kept = [-1], {key: values.mean(0, keepdim=True) for key, values in kept.items()}
            assert positions == wanted
            assert_rows(rows, kept)
            for scores in said.probed:
                torch.testing.assert_close(scores, probe.linear_probe.scores(expected[probe.key]), rtol=1e-3, atol=1e-3)


def test_what_can_never_fit_is_refused_at_once(under_test: Subject) -> None:
    with pytest.raises(RequestTooLargeError, match="9 tokens and up to 10000000000 new ones"):
        under_test.engine.submit(Call(PROMPTS[1], Sampling(10**10, temperature=0)).job)


@pytest.mark.parametrize("name", [name for name in ENGINES if name in ("transformers", "vllm eager")])
def test_a_full_queue_is_refused_and_a_closed_engine_says_so(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with subject(name, tmp_path_factory.mktemp(name), max_batch=1, max_queue=1) as full:
        endless = Sampling(100, temperature=0, min_tokens=100)
        calls = [Call(PROMPTS[0], endless, stream=True) for _ in range(40)]
        running: list[Call] = []

        def submit_all() -> None:
            for call in calls:
                full.engine.submit(call.job)
                running.append(call)

        with pytest.raises(EngineBusyError):
            submit_all()
        full.engine.close()
        for call in running:
            last = call.events[-1]
            assert isinstance(last, Finished) or (
                isinstance(last, Failed) and isinstance(last.error, EngineStoppedError)
            )
        with pytest.raises(EngineStoppedError):
            full.engine.submit(Call(PROMPTS[0], GREEDY).job)
