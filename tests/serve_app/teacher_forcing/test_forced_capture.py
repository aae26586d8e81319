"""Teacher-forced rows against two independent paths: stock transformers with plain hooks, and generation itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from ulid import ULID

from roentgen.contract import ActivationRequest, Positions, RolloutKey
from roentgen.store import Session, StoreError, StoreWriter, verify
from roentgen.transcripts import KnownTokens, Transcript
from serve_app.capture.rows import CapturePlan, UncapturableError
from serve_app.engines.protocol import EngineStoppedError, GenerationJob, RequestTooLargeError, Sampling
from serve_app.engines.rollout_metadata import join, make_metadata
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.openai_api.chat import Message
from serve_app.openai_api.prompt import render
from serve_app.teacher_forcing.forced_capture import FailedText, StoredText, TeacherForcing, layer_chunks
from serve_app.teacher_forcing.tokens import TokenizedTranscript, transcript_tokenizer
from tests.serve_app import tiny
from tests.serve_app.teacher_forcing.conftest import TRANSCRIPTS, TeacherForce

KEYS = ["layers.0.resid_post", "layers.1.resid_post", "layers.2.resid_post", "embed"]


class Watched:
    """An engine that remembers the jobs it was given; it refuses those of one length."""

    def __init__(self, engine: TransformersEngine, refuses: int | None = None) -> None:
        self.engine = engine
        self.refuses = refuses
        self.jobs: list[GenerationJob] = []

    @property
    def alive(self) -> bool:
        return self.engine.alive

    def submit(self, job: GenerationJob) -> None:
        if len(job.prompt_ids) == self.refuses:
            raise RequestTooLargeError("no room")
        self.engine.submit(job)
        self.jobs.append(job)


def stock(architecture: str, tokens: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run tokens alone through stock transformers: rows by key, `[tokens, d]`, and log-probabilities `[tokens, vocab]`."""
    model, seen = tiny.module(architecture), {}
    gpt2 = architecture == "gpt2"
    body = model.transformer if gpt2 else model.model
    modules = {f"layers.{i}.resid_post": block for i, block in enumerate(body.h if gpt2 else body.layers)}
    for key, module in {**modules, "embed": body.wte if gpt2 else body.embed_tokens}.items():

        def hook(module: Any, args: Any, output: Any, key: str = key) -> None:
            seen[key] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        module.register_forward_hook(hook)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return seen, logits.float().log_softmax(-1)


def error(rows: torch.Tensor, expected: torch.Tensor) -> float:
    assert rows.shape == expected.shape
    return float(((rows - expected).norm(dim=1) / expected.norm(dim=1)).max())


def column(session: Session, row: pd.Series, name: str) -> np.ndarray:
    return load_file(f"{session.uri}/{row['shard']}")[name][row["row_start"] : row["row_stop"]]


def capture_all(
    forcing: TeacherForcing, model: LoadedModel, transcripts: list[Transcript] = TRANSCRIPTS
) -> dict[str, TokenizedTranscript]:
    texts = [transcript_tokenizer(model)(transcript) for transcript in transcripts]
    outcomes = list(forcing.capture(texts))
    assert len(outcomes) == len(texts)
    assert {type(outcome) for outcome in outcomes} == {StoredText}
    return {text.transcript.name: text for text in texts}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_rows_and_logprobs_are_those_of_stock_transformers(
    force: TeacherForce, tmp_path: Path, architecture: str, chunk_size: int | None
) -> None:
    model = tiny.loaded(architecture)
    engine = TransformersEngine(model)
    texts = capture_all(force(model, engine, chunk_size), model)
    engine.close()
    session = Session.open(tmp_path / "s")
    assert session.keys() == KEYS
    frame = session.rollouts(unique=False)
    assert sorted(frame["problem_id"]) == sorted(texts)
    for i, row in frame.iterrows():
        text = texts[row["problem_id"]]
        tokens, n_prompt, n_rows = text.sequence.token_ids, text.sequence.n_prompt, text.sequence.n_rows
        expected, scores = stock(architecture, tokens)
        for key in KEYS:
            rows = session.activations(key, where=frame)[i]
            assert rows.position.tolist() == list(range(n_rows))
            assert error(rows.values, expected[key][:n_rows]) <= 1e-4, (key, row["problem_id"])
        said = [float(scores[t - 1, tokens[t]]) for t in range(n_prompt, len(tokens))]
        logprob = column(session, row, "logprob")
        assert np.isnan(logprob[:n_prompt]).all()
        np.testing.assert_allclose(logprob[n_prompt:], said[:-1], rtol=1e-4, atol=1e-5)
        assert column(session, row, "token_id").tolist() == tokens[:n_rows]
        assert column(session, row, "generated").tolist() == [t >= n_prompt for t in range(n_rows)]
        if said:
            assert row["final_token"] == tokens[-1]
            assert row["final_logprob"] == pytest.approx(said[-1], rel=1e-4, abs=1e-5)
        assert list(row["token_ids"]) == tokens
        assert (row["n_prompt"], row["n_completion"]) == (n_prompt, len(tokens) - n_prompt)
        assert (row["text"], row["labels"]) == (text.sequence.text, {"number": int(row["problem_id"][1:])})
        assert row["finish_reason"] == text.transcript.finish_reason
    assert verify(session).ok


def test_reading_an_answer_again_gives_what_generating_it_gave(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel, tmp_path: Path
) -> None:
    """The same store rows, by both ways: tensors, columns, index."""
    asked = ActivationRequest(layers="all", hook_points=("resid_post", "embed"))
    plan = CapturePlan(llama.structure.resolve(asked), Positions.parse("all"), "model")
    prompts = [render(llama.tokenizer, [Message(role="user", content=c)], "tiny").prompt for c in ("hi", "2 + 2?", "x")]
    calls = [
        tiny.Call(p.token_ids, Sampling(max_tokens=6 + i, temperature=1, seed=i), plan) for i, p in enumerate(prompts)
    ]
    transcripts = []
    with StoreWriter(tmp_path) as writer:
        for i, (prompt, finished) in enumerate(zip(prompts, tiny.run(engine, calls), strict=True)):
            key = RolloutKey(config_hash="c", problem_id=f"p{i}")
            keyed = asked.model_copy(update={"key": key})
            entry = make_metadata(llama, prompt, "assistant", keyed, finished, "own", str(ULID()))
            rollout = join(entry, finished.captured)
            writer.submit(rollout).result()
            known = KnownTokens("tiny-llama", "0", rollout.sequence)
            transcripts.append(Transcript(key, (), "", finished.finish_reason, tokens=known))
    capture_all(force(llama, engine), llama, transcripts)

    own, again = (
        (s := Session.open(tmp_path / name), s.rollouts().sort_values("problem_id").reset_index(drop=True))
        for name in ("own", "s")
    )
    assert len(own[1]) == len(again[1]) == 3
    for i in range(3):
        for key in KEYS:
            rows = [session.activations(key, where=frame)[i].values for session, frame in (own, again)]
            assert error(*rows) <= 1e-4
        for name in ("token_id", "position", "generated", "logprob"):
            columns = [column(session, frame.iloc[i], name) for session, frame in (own, again)]
            np.testing.assert_allclose(*columns, rtol=1e-4, atol=1e-5)
        for name in ("text", "finish_reason", "final_token", "n_prompt", "n_completion"):
            assert own[1].iloc[i][name] == again[1].iloc[i][name]
        assert own[1].iloc[i]["final_logprob"] == pytest.approx(again[1].iloc[i]["final_logprob"], rel=1e-4, abs=1e-5)
        assert [list(own[1].iloc[i][name]) for name in ("token_ids", "token_offsets", "segments")] == [
            list(again[1].iloc[i][name]) for name in ("token_ids", "token_offsets", "segments")
        ]


@pytest.mark.parametrize(
    "positions", ["prompt", "generated", "last_prompt", "last", "stride:3", "mean_prompt", "mean_generated"]
)
def test_position_policies_count_from_the_completion(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel, tmp_path: Path, positions: str
) -> None:
    texts = capture_all(force(llama, engine, positions=positions), llama)
    session = Session.open(tmp_path / "s")
    frame = session.rollouts()
    for i, row in frame.iterrows():
        text = texts[row["problem_id"]]
        wanted = Positions.parse(positions).select(text.sequence.n_prompt, text.sequence.n_rows)
        expected = stock("llama", text.sequence.token_ids)[0]["layers.1.resid_post"][wanted]
        if positions.startswith("mean_") and len(wanted):
            expected = expected.mean(0, keepdim=True)
            wanted = [-1]
        rows = session.activations("layers.1.resid_post", positions=positions)[i]
        assert rows.position.tolist() == list(wanted)
        assert len(wanted) == 0 or error(rows.values, expected) <= 1e-4


def test_a_pass_captures_its_own_layers_and_scores_once(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel
) -> None:
    watched = Watched(engine)
    capture_all(force(llama, watched, 1), llama)
    n = len(TRANSCRIPTS)
    keys = [tuple(job.capture.taps) for job in watched.jobs]
    assert keys == [(KEYS[0], "embed")] * n + [(KEYS[1],)] * n + [(KEYS[2],)] * n
    assert not any(job.score_prompt for job in watched.jobs[n:])
    lengths = [len(job.prompt_ids) for job in watched.jobs[:n]]
    assert lengths == sorted(lengths, reverse=True)


def test_chunks_are_of_layers_not_of_keys() -> None:
    keys = ["embed", *(f"layers.{i}.{h}" for h in ("ln_attn", "mlp_out") for i in (8, 0, 4)), "final_norm"]
    chunks = layer_chunks(dict.fromkeys(keys), 2)
    assert [sorted(chunk) for chunk in chunks] == [
        ["embed", "final_norm", "layers.0.ln_attn", "layers.0.mlp_out", "layers.4.ln_attn", "layers.4.mlp_out"],
        ["layers.8.ln_attn", "layers.8.mlp_out"],
    ]
    assert layer_chunks({"embed": None}, 2) == [{"embed": None}]
    assert layer_chunks(dict.fromkeys(keys), None) == [dict.fromkeys(keys)]


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_one_that_the_engine_refuses_stops_nobody(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel, tmp_path: Path, chunk_size: int | None
) -> None:
    texts = [transcript_tokenizer(llama)(t) for t in TRANSCRIPTS]
    refused = texts[1]
    outcomes = list(force(llama, Watched(engine, len(refused.sequence.token_ids)), chunk_size).capture(texts))
    assert [o for o in outcomes if isinstance(o, FailedText)] == [FailedText(refused, "RequestTooLargeError: no room")]
    assert len(Session.open(tmp_path / "s").rollouts()) == len(outcomes) - 1 == len(TRANSCRIPTS) - 1


def test_a_full_queue_is_waited_for_while_results_are_taken(
    force: TeacherForce, llama: LoadedModel, tmp_path: Path
) -> None:
    engine = TransformersEngine(llama, max_batch=1, max_queue=0)
    watched = Watched(engine)
    transcripts = [replace(TRANSCRIPTS[0], key=RolloutKey(config_hash="c", problem_id=str(i))) for i in range(40)]
    outcomes = force(llama, watched).capture([transcript_tokenizer(llama)(transcript) for transcript in transcripts])
    assert isinstance(next(outcomes), StoredText)
    assert len(watched.jobs) < 40
    assert len(list(outcomes)) == 39
    engine.close()
    assert len(Session.open(tmp_path / "s").rollouts()) == 40


def test_a_text_whose_rollout_cannot_be_stored_fails_alone(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel, tmp_path: Path
) -> None:
    beyond = TRANSCRIPTS[3].key.model_copy(update={"turn": 2**31})
    transcripts = [
        *TRANSCRIPTS,
        replace(TRANSCRIPTS[3], key=beyond),
        replace(TRANSCRIPTS[0], labels={"n": float("nan")}),
    ]
    texts = [transcript_tokenizer(llama)(transcript) for transcript in transcripts]
    outcomes = list(force(llama, engine).capture(texts))
    reasons = sorted(outcome.reason for outcome in outcomes if isinstance(outcome, FailedText))
    assert [reason.split(":")[:2] for reason in reasons] == [
        ["UnstorableError", " labels"],
        ["UnstorableError", " turn"],
    ]
    assert sorted(Session.open(tmp_path / "s").rollouts()["problem_id"]) == [t.key.problem_id for t in TRANSCRIPTS]


def test_a_hook_point_without_rows_ends_it(force: TeacherForce, engine: TransformersEngine, llama: LoadedModel) -> None:
    with pytest.raises(UncapturableError, match=r"model\.layers\.output"):
        capture_all(force(llama, engine, hook_points=["model.layers.output"]), llama, [TRANSCRIPTS[2]])


def test_a_closed_engine_ends_it(force: TeacherForce, llama: LoadedModel) -> None:
    engine = TransformersEngine(llama)
    engine.close()
    with pytest.raises(EngineStoppedError):
        capture_all(force(llama, engine), llama)


def test_a_full_disk_ends_it_and_says_so(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("roentgen.store.storage_backends.write_chunks", full)
    with pytest.raises(StoreError, match=r"could not be stored: .*No space left"):
        capture_all(force(llama, engine), llama)


def test_a_text_with_a_token_that_the_model_does_not_have_stops_nobody(
    engine: TransformersEngine, llama: LoadedModel, tmp_path: Path
) -> None:
    texts = [transcript_tokenizer(llama)(t) for t in TRANSCRIPTS]
    tokens = [*texts[0].sequence.token_ids[:-1], 257]
    wrong = replace(texts[0], sequence=replace(texts[0].sequence, token_ids=tokens))
    with StoreWriter(str(tmp_path / "more")) as writer:
        asked = ActivationRequest(layers=(0,), hook_points=("resid_post",))
        forcing = TeacherForcing(llama, engine, writer, asked, "s")
        outcomes = list(forcing.capture([wrong, *texts[1:]]))
    (failed,) = [outcome for outcome in outcomes if isinstance(outcome, FailedText)]
    assert failed.text is wrong
    assert "257 is out of vocabulary; the model has 257 tokens, 0–256" in failed.reason
    assert len([outcome for outcome in outcomes if isinstance(outcome, StoredText)]) == len(texts) - 1
