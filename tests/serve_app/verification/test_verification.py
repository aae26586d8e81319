"""A verification passes for captures that are right, and finds each way in which they can be wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from roentgen.cli import app
from roentgen.contract import Positions
from serve_app.capture.observer import observe
from serve_app.capture.resolver import resolve_structure
from serve_app.capture.rows import CapturedRows, CapturePlan
from serve_app.capture.structure import CaptureRequestError, Tap
from serve_app.engines.protocol import Finished, TokenScore
from serve_app.engines.transformers.grouped_attention import use_grouped_attention
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.models.model_source import ModelSource
from serve_app.verification import VerificationError, read_prompts, render, taps_to_verify, verify, verify_capture
from serve_app.verification.batch_run import RequestOutcome, run_requests
from serve_app.verification.comparison import row_errors
from serve_app.verification.mix import MixRequest
from serve_app.verification.reference import kept_positions, stock_attention
from tests.serve_app import tiny


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "olmo2", "gpt2", "gpt_neox"])
def test_captures_of_a_running_batch_equal_those_of_a_lone_forward(architecture: str) -> None:
    model = tiny.loaded(architecture)
    report = verify_capture(model)
    assert report.problems == ()
    assert report.ok
    assert {d.key for d in report.deviations} == set(model.structure.taps)
    assert max(d.max_error for d in report.deviations) < 1e-5
    assert report.max_logprob_error < 1e-5
    assert report.divergences == ()
    assert report.together > 2
    assert {r.ended for r in report.rollouts} >= {"length", "stop token", "cancelled"}
    assert {r.positions for r in report.rollouts} >= {"all", "last", "mean_prompt", "mean_generated", "stride:3"}
    assert {r.sampling for r in report.rollouts} >= {"greedy", "seed 7"}


def test_a_stop_string_ends_one_request(llama: LoadedModel) -> None:
    assert "stop string" in {r.ended for r in verify_capture(llama).rollouts}


def test_bfloat16_is_judged_by_cosine_and_divergences_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's logits are so close together that rounding decides some choices."""
    weights, words = tiny.module("llama").to(torch.bfloat16), tiny.tokenizer()
    use_grouped_attention(weights)
    structure = resolve_structure(weights, "tiny-llama")
    source = ModelSource("tiny-llama", "tiny", "0")
    model = LoadedModel(source, words, structure, torch.device("cpu"), torch.bfloat16, observe(weights, words))
    report = verify_capture(model)
    assert report.problems == ()
    assert 0.999 <= min(d.min_cosine for d in report.deviations) < 1
    assert max(d.max_error for d in report.deviations) > 1e-4
    assert all(0 <= d.margin <= d.rounding for d in report.divergences)

    run = verify.run_requests

    def shifted_outcomes(model: LoadedModel, requests: list[MixRequest]) -> tuple[list[RequestOutcome], int]:
        outcomes, together = run(model, requests)
        return [replace(o, finished=shifted(o.finished)) if o.finished else o for o in outcomes], together

    monkeypatch.setattr(verify, "run_requests", shifted_outcomes)
    problems = verify_capture(model).problems
    assert any(problem.startswith("layers.1.resid_post: the rows' mean cosine is") for problem in problems)


@pytest.fixture(scope="module")
def outcomes(llama: LoadedModel) -> list[RequestOutcome]:
    """What the engine really gives to the mix that `verify_capture` makes."""
    kept: list[RequestOutcome] = []

    def run_and_keep(model: LoadedModel, requests: list[MixRequest]) -> tuple[list[RequestOutcome], int]:
        found, together = run_requests(model, requests)
        kept.extend(found)
        return found, together

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_requests", run_and_keep)
        assert verify_capture(llama).ok
    return kept


def altered(finished: Finished, change: Callable[[CapturedRows], CapturedRows]) -> Finished:
    return replace(finished, captured=change(finished.captured)) if finished.captured else finished


def shifted(finished: Finished) -> Finished:
    """Rows of the position before."""
    return altered(finished, lambda rows: replace(rows, tensors={k: v.roll(1, 0) for k, v in rows.tensors.items()}))


def rounded(finished: Finished) -> Finished:
    """Rows that went through bfloat16."""
    return altered(
        finished, lambda rows: replace(rows, tensors={k: v.bfloat16().float() for k, v in rows.tensors.items()})
    )


def shortened(finished: Finished) -> Finished:
    """The last row is missing."""
    return altered(
        finished, lambda rows: CapturedRows({k: v[:-1] for k, v in rows.tensors.items()}, rows.position[:-1])
    )


def renumbered(finished: Finished) -> Finished:
    """The right rows, said to be of the next positions."""
    return altered(finished, lambda rows: replace(rows, position=rows.position + 1))


def uncaptured(finished: Finished) -> Finished:
    return replace(finished, captured=None)


def another_token(finished: Finished) -> Finished:
    """The last token is one that the model did not choose."""
    return replace(finished, token_ids=[*finished.token_ids[:-1], 17]) if finished.token_ids else finished


def other_scores(finished: Finished) -> Finished:
    return replace(finished, scores=[TokenScore(score.logprob - 0.01) for score in finished.scores])


def unscored_prompt(finished: Finished) -> Finished:
    return replace(finished, prompt_scores=None)


def another_reason(finished: Finished) -> Finished:
    return replace(finished, finish_reason="length" if finished.finish_reason == "stop" else "stop")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (shifted, "relative error"),
        (rounded, "relative error"),
        (shortened, "has rows of positions"),
        (renumbered, "has rows of positions"),
        (uncaptured, "requested a capture and got none"),
        (another_token, "not the most likely one by a margin"),
        (other_scores, "is off by 1.0e-02"),
        (unscored_prompt, "scores for"),
        (another_reason, "does not match its tokens"),
    ],
)
def test_what_is_wrong_is_found(
    llama: LoadedModel,
    outcomes: list[RequestOutcome],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Finished], Finished],
    found: str,
) -> None:
    spoiled = [replace(o, finished=change(o.finished)) if o.finished else o for o in outcomes]
    monkeypatch.setattr(verify, "run_requests", lambda *_: (spoiled, 8))
    report = verify_capture(llama)
    assert not report.ok
    assert any(found in problem for problem in report.problems), report.problems


def test_a_layer_captured_wrongly_is_named(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taps = llama.structure.taps
    wrong = taps | {"layers.1.resid_post": taps["layers.1.resid_pre"]}

    def misread(model: LoadedModel, requests: list[MixRequest]) -> tuple[list[RequestOutcome], int]:
        asked = [
            replace(r, plan=replace(r.plan, taps={key: wrong[key] for key in r.plan.taps})) if r.plan else r
            for r in requests
        ]
        outcomes, together = run_requests(model, asked)
        return [replace(o, request=r) for o, r in zip(outcomes, requests, strict=True)], together

    monkeypatch.setattr(verify, "run_requests", misread)
    (problem,) = verify_capture(
        llama, taps={key: taps[key] for key in ("layers.1.resid_post", "layers.2.resid_post")}
    ).problems
    assert problem.startswith("layers.1.resid_post: a row's relative error is")


def test_a_request_that_fails_or_outlives_its_cancellation_is_found(
    llama: LoadedModel, outcomes: list[RequestOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = list(outcomes)
    spoiled[2] = replace(spoiled[2], finished=None, error=RuntimeError("out of luck"))
    spoiled[5] = replace(spoiled[5], finished=spoiled[4].finished)
    monkeypatch.setattr(verify, "run_requests", lambda *_: (spoiled, 8))
    problems = verify_capture(llama).problems
    assert "request 2 (free): failed: out of luck" in problems
    assert "request 5 (cancelled): was cancelled, but finished anyway" in problems


def test_a_key_of_which_no_row_was_compared_is_found(
    llama: LoadedModel, outcomes: list[RequestOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "run_requests", lambda *_: ([replace(o, finished=None) for o in outcomes], 1))
    problems = verify_capture(llama).problems
    assert "layers.1.attn_out: no row was compared" in problems
    assert "no two requests ran at the same time, so nothing was batched" in problems


def test_the_output_head_is_captured_like_any_module(llama: LoadedModel) -> None:
    report = verify_capture(llama, taps={"head": Tap("lm_head", "output"), "last": Tap("model.norm", "output")})
    assert report.ok, report.problems
    assert {d.key for d in report.deviations} == {"head", "last"}


def test_a_router_beside_the_first_output_is_captured() -> None:
    model = tiny.loaded("llama4_text")
    report = verify_capture(model, taps=taps_to_verify(model.structure, (1,), ("router", "mlp_out")))
    assert report.ok, report.problems


def test_the_model_is_given_back_as_it_was(llama: LoadedModel) -> None:
    config = llama.observed._module.config
    before = config._attn_implementation
    with stock_attention(llama):
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == before != "sdpa"


POLICIES = [
    "all",
    "prompt",
    "generated",
    "last_prompt",
    "last",
    "stride:1",
    "stride:4",
    "mean_prompt",
    "mean_generated",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_reference_and_the_engine_keep_the_same_positions(policy: str) -> None:
    for n_prompt, n_rows, first, stop in [
        (5, 12, 0, None),
        (5, 5, 0, None),
        (1, 1, 0, None),
        (7, 30, 3, 20),
        (4, 9, 6, 8),
    ]:
        plan = CapturePlan({}, Positions.parse(policy), "model", first=first, stop=stop)
        assert kept_positions(plan, n_prompt, n_rows) == list(plan.kept(n_prompt, 0, n_rows))


def test_row_errors() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    errors, cosines = row_errors(rows, expected)
    assert errors.tolist() == [0, 0, float("inf"), pytest.approx(2**0.5)]
    assert cosines.tolist() == [1, 1, 0, 0]


def test_a_users_prompts(llama: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"question": "' + "two " * 100 + '"}\n')
    prompts = read_prompts(file)
    assert prompts == ["one", "two " * 100]
    report = verify_capture(llama, prompts=prompts, count=4)
    assert report.ok
    assert {r.n_prompt for r in report.rollouts} == {3, llama.context_length - 49}

    text = tmp_path / "prompts.txt"
    text.write_text("a\nb\n")
    assert read_prompts(text) == ["a", "b"]


@pytest.mark.parametrize("content", ["", "{", '{"text": "a"}', "3"])
def test_prompts_that_cannot_be_used_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(VerificationError, match=r"prompts\.jsonl"):
        read_prompts(file)
    file.write_text(content)
    with pytest.raises(VerificationError, match=r"prompts\.jsonl"):
        read_prompts(file)


def test_which_hook_points_are_verified(llama: LoadedModel) -> None:
    structure = llama.structure
    assert taps_to_verify(structure, "all", ()) == structure.taps
    some = taps_to_verify(structure, (0, -1), ())
    assert {"layers.0.attn_out", "layers.2.mlp_out", "embed", "final_norm"} < set(some)
    assert not any(key.startswith("layers.1.") for key in some)
    assert list(taps_to_verify(structure, (1,), ("mlp.gate_proj.output",))) == ["layers.1.mlp.gate_proj.output"]
    with pytest.raises(CaptureRequestError, match="40 is out of range"):
        taps_to_verify(structure, (40,), ())


def test_what_is_printed(llama: LoadedModel) -> None:
    console = Console(width=200, record=True)
    report = verify_capture(llama, taps=taps_to_verify(llama.structure, (1,), ("resid_post", "embed")))
    console.print(render(report))
    console.print(render(replace(report, problems=("request 3 (free): it is wrong",))))
    lines = console.export_text().splitlines()
    assert [line for line in lines if "resid_post" in line and "1.0000000" in line]
    assert any(line.startswith("passed  tiny-llama 0, float32, cpu: every row's error ≤ 1e-04") for line in lines)
    assert any(line.startswith("failed  tiny-llama") for line in lines)
    assert "  request 3 (free): it is wrong" in [line.rstrip() for line in lines]


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify-capture", *arguments])


@pytest.mark.integration
def test_the_command_verifies_a_real_model() -> None:
    result = command("smollm2-135m", "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"]
    assert len(report["deviations"]) == 30 * 7 + 2
    assert max(d["max_error"] for d in report["deviations"]) < 1e-4
    assert {"stop string", "stop token", "cancelled", "length"} <= {r["ended"] for r in report["rollouts"]}


@pytest.mark.integration
def test_the_command_fails_when_the_captures_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.verification.comparison.MAX_ERROR", 1e-9)
    result = command(
        "smollm2-135m", "--dtype", "float32", "--layers", "0,29", "--hook-points", "resid_post", "--requests", "8"
    )
    assert result.exit_code == 1
    assert "failed  smollm2-135m" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such/model/here"], "there is no such folder"),
        (["smollm2-135m", "--dtype", "int8"], "--dtype"),
        (["smollm2-135m", "--layers", "first"], "--layers: 'first' is not a list of layers"),
        (["smollm2-135m", "--prompts", "no_such_file.txt"], "no_such_file.txt"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], said: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert said in result.output
