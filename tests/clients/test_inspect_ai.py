"""inspect_ai: its own tasks through the provider `roentgen/…`, and its OpenAI-compatible provider, unmodified."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from inspect_ai import Task, eval, score
from inspect_ai.agent import react
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import EvalLog, list_eval_logs, read_eval_log, read_eval_log_sample_summaries, write_eval_log
from inspect_ai.model import (
    ChatMessage,
    ChatMessageTool,
    ChatMessageUser,
    GenerateConfig,
    ResponseSchema,
    get_model,
)
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate
from inspect_ai.tool import Tool, ToolInfo, ToolParams, tool
from inspect_ai.util import json_schema
from inspect_scout import scan, scan_results_df, transcripts_from
from openai import OpenAI

from roentgen.harnesses.inspect_log import references
from roentgen.harnesses.inspect_provider import Calls, RoentgenAPI
from roentgen.harnesses.inspect_scanner import probe_scores
from roentgen.harnesses.join import join
from roentgen.store import Session
from serve_app.config import ServerConfig
from serve_app.http.ingress import Ingress
from serve_app.replica.model_replica import ModelReplica
from tests.clients.asked import MODEL, QUESTION, SUM, Answer, Weather, keep, stored
from tests.clients.conftest import Documentation
from tests.conftest import Server
from tests.serve_app import tiny
from tests.serve_app.http.test_replies import TEMPLATE, Handle

KEEP = {"layers": "3", "hook_points": "resid_post", "positions": "last"}


def rollouts(store: Path, session: str) -> dict[str, dict[str, Any]]:
    """A session's index, by the rollouts' ids."""
    frame = Session.open(str(store / session)).rollouts(unique=False, columns=("labels", "text"))
    return {row["rollout_id"]: {str(name): value for name, value in row.items()} for row in frame.to_dict("records")}


def check_joined(log: EvalLog, kept: dict[str, dict[str, Any]], scorer: str) -> int:
    """Every model call has one rollout, under its key, with its sample's score; returns how many calls there are."""
    assert log.status == "success", log.error
    assert log.samples
    named = 0
    for sample in log.samples:
        assert sample.scores is not None
        calls = [event for event in sample.events if event.event == "model"]
        found = list(references(sample))
        assert len(found) == len(calls) > 0
        value = {"C": 1.0, "I": 0.0}[str(sample.scores[scorer].value)]
        for turn, one in enumerate(found):
            (rollout_id,) = one["rollout_ids"]
            row = kept[rollout_id]
            key = tuple(row[name] for name in ("config_hash", "problem_id", "epoch", "turn"))
            assert key == (log.eval.eval_id, f"{log.eval.task}/{sample.id}", sample.epoch, turn)
            assert row["labels"][scorer] == value
            assert one["rows"] == row["row_stop"] - row["row_start"]
        named += len(found)
    return named


@pytest.mark.integration
def test_gsm8k_runs_scores_and_keeps_activations(docs: Documentation, server: Server) -> None:
    docs.run("inspect")
    (found,) = list_eval_logs(str(docs.folder / "logs"))
    log = read_eval_log(found)
    assert log.samples is not None
    assert len(log.samples) == 4
    for sample in log.samples:
        assert sample.output.completion
        assert sample.output.usage is not None
        assert sample.output.usage.output_tokens > 0
        assert sample.output.stop_reason in ("stop", "max_tokens")
    kept = rollouts(server.store, "inspect")
    assert check_joined(log, kept, "match") == len(kept) == 4
    for sample in log.samples:  # samples run at once, so they are stored in any order
        assert sum(str(sample.input) in row["text"] for row in kept.values()) == 1
    # Another scorer, afterwards, from the log alone; then the same again.
    file = Path(found.name.removeprefix("file://"))
    again = score(log, includes(), action="append", display="none")
    again.location = str(file.with_name("again.eval"))
    write_eval_log(again)
    for changed in (4, 0):
        report = join(again.location, f"{server.base_url}/activations/session/inspect")
        assert (report.samples, report.matched, report.changed) == (4, 4, changed)
    assert all({"match", "includes"} <= row["labels"].keys() for row in rollouts(server.store, "inspect").values())


@tool
def steering_vector() -> Tool:
    async def execute(x: int, y: int) -> int:
        """Add two numbers.

        Args:
            x: the first.
            y: the second.
        """
        return x + y

    return execute


@pytest.mark.integration
def test_each_turn_of_an_agent_is_a_rollout(server: Server, tmp_path: Path) -> None:
    data = MemoryDataset([Sample(id=f"sum {n}", input=f"What is {n} + 3?", target=str(n + 3)) for n in range(2)])
    task = Task(
        name="agent", dataset=data, solver=react(tools=[steering_vector()]), scorer=includes(), message_limit=8, epochs=2,
        config=GenerateConfig(temperature=0, max_tokens=24),
    )  # fmt: skip
    model = get_model(f"roentgen/{MODEL}", base_url=server.base_url, session="agent", memoize=False, **KEEP)
    (log,) = eval(task, model, log_dir=str(tmp_path), display="none", score=True)
    kept = rollouts(server.store, "agent")
    assert check_joined(read_eval_log(log.location), kept, "includes") == len(kept) >= 8
    assert max(row["turn"] for row in kept.values()) >= 1


@pytest.mark.integration
@pytest.mark.rotating
@pytest.mark.parametrize(
    ("provider", "options"),
    [("roentgen", {}), ("roentgen", {"stream": True}), ("openai-api/roentgen", {"responses_api": True})],
    ids=["chat", "stream", "responses"],
)
async def test_tools_typed_answers_and_a_prompt_that_is_too_long(
    server: Server, provider: str, options: dict[str, bool]
) -> None:
    session = "-".join(["tools", *options])
    extra = {"stop": ["."]} if provider == "roentgen" else keep(session)
    mine = {"session": session, **KEEP} if provider == "roentgen" else {"api_key": "none"}
    config = GenerateConfig(temperature=0, max_tokens=60, extra_body=extra, parallel_tool_calls=False)
    model = get_model(f"{provider}/{MODEL}", base_url=server.base_url, config=config, memoize=False, **mine, **options)
    weather = ToolInfo(name="weather", description="Look it up.", parameters=ToolParams(**Weather.model_json_schema()))
    asked = await model.generate(QUESTION, tools=[weather], tool_choice="any")
    called = asked.message
    assert called.tool_calls
    Weather.model_validate(called.tool_calls[0].arguments)
    result = ChatMessageTool(content="snow", tool_call_id=called.tool_calls[0].id, function="weather")
    history: list[ChatMessage] = [ChatMessageUser(content=QUESTION), called, result]
    assert (await model.generate(history, tools=[weather], tool_choice="none")).completion
    shape = ResponseSchema(name="answer", json_schema=json_schema(Answer))
    typed = await model.generate(SUM, config=GenerateConfig(response_schema=shape))
    Answer.model_validate_json(typed.completion)
    assert (await model.generate(str([*range(9000)]))).stop_reason == "model_length"
    # For the Responses API, inspect_ai sends fields of its own list only, and no other of `extra_body`.
    if provider == "roentgen":
        assert stored(server.store, session) == 3
        assert asked.metadata is not None
        (rollout_id,) = asked.metadata["roentgen"]["rollout_ids"]
        assert rollout_id in rollouts(server.store, session)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a server of a tiny random model, and its store: the real routes and engine, without Serve."""
    folder, store = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("store")
    tiny.module("llama").save_pretrained(folder)
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    config = ServerConfig(model=str(folder), store=str(store), dtype="float32", threads=1, max_queue=2000)
    replica = ModelReplica(config)
    replica.reconfigure(config.choice.model_dump())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ROENTGEN_API_KEY", raising=False)
        app = Ingress(Handle(replica), config, lambda choice: None).__serve_build_asgi_app__()
        web = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=web.run, daemon=True)
        thread.start()
        while not web.started or not replica.record_routing_stats()["ready"]:
            time.sleep(0.05)
        port = web.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1", store
        web.should_exit = True
        thread.join(10)
    replica.close()


@pytest.mark.rotating
def test_a_thousand_samples_are_kept_keyed_and_joined(small: tuple[str, Path], tmp_path: Path) -> None:
    served = OpenAI(base_url=small[0], api_key="none").models.list().data[0].id
    probe = {"name": "p", "key": "layers.1.resid_post", "weight": [0.25] * 32}
    model = get_model(
        f"roentgen/{served}", base_url=small[0], memoize=False, session="many", layers=[1], hook_points=["resid_post"],
        positions="last_prompt", probes=[probe], labels={"of": "many"},
    )  # fmt: skip
    data = MemoryDataset([Sample(id=n, input=f"Say {n}.", target="e") for n in range(1000)])
    task = Task(
        name="many", dataset=data, solver=generate(), scorer=match(), config=GenerateConfig(max_tokens=2, seed=1)
    )
    (log,) = eval(
        task, model, log_dir=str(tmp_path), display="none", max_connections=64, max_samples=64, log_realtime=False
    )
    log = read_eval_log(log.location)
    kept = rollouts(small[1], "many")
    assert check_joined(log, kept, "match") == len(kept) == 1000
    assert len(read_eval_log_sample_summaries(log.location)) == 1000
    session = Session.open(str(small[1] / "many"))
    assert session.activations("layers.1.resid_post").stack().shape == (1000, 32)
    assert {row["labels"]["of"] for row in kept.values()} == {"many"}
    # The scanner reads the same scores from the log.
    status = scan(
        [probe_scores(probe="p", at="last_prompt")], transcripts_from(log.location), scans=str(tmp_path / "scans"),
        limit=20, display="none", max_processes=1,
    )  # fmt: skip
    found = scan_results_df(status.location).scanners["probe_scores"]
    assert len(found) == 20
    assert log.samples is not None
    said = {sample.uuid: next(references(sample))["probes"][0]["last_prompt"] for sample in log.samples}
    for row in found.to_dict("records"):
        assert float(row["value"]) == pytest.approx(said[row["transcript_id"]])


def test_a_call_that_is_tried_again_keeps_its_number() -> None:
    calls = Calls()
    with calls.number() as first, calls.number() as second:
        assert (first, second) == (0, 1)
    with pytest.raises(ConnectionError), calls.number() as third:
        raise ConnectionError
    with calls.number() as again, calls.number() as fourth:
        assert (third, again, fourth) == (2, 2, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": "some"}, "layers: "),
        ({"positions": "every"}, "positions: 'every' is not a position policy"),
        ({"layers": 1, "session": "a b"}, "session: 'a b' is not a session id"),
        ({"responses_api": True}, "responses_api: "),
        ({"probes": "a/b", "stream": True}, "stream: "),
    ],
)
def test_what_cannot_be_kept_is_said_before_a_task_begins(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RoentgenAPI("m", **given)


def test_what_the_command_line_makes_of_a_list_is_one() -> None:
    for layers in ([8, 12], ["8", "12"], "8,12"):
        kept = RoentgenAPI("m", layers=layers, hook_points=["resid_post", "mlp_out"])._kept
        assert kept is not None
        assert (kept["layers"], kept["hook_points"]) == ((8, 12), ("resid_post", "mlp_out"))
        json.dumps(kept)
