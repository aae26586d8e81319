"""An evaluation from a script: its arguments, and with a real server the whole of it, also inside a running event loop."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import roentgen
from eval_jobs import EvalError
from tests.conftest import RayHome

PROBLEMS = [{"question": f"What is {number} + 1?", "answer": number + 1} for number in range(3)]


def test_arguments_that_cannot_be_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"problems\[1\]: 'answer' is missing; the record has q"):
        roentgen.evaluate([PROBLEMS[0], {"question": "?"}], output=tmp_path / "run")
    with pytest.raises(EvalError, match="problems: the list is empty"):
        roentgen.evaluate([], output=tmp_path / "run")
    with pytest.raises(EvalError, match="unknown; allowed are arithmetic, gsm8k"):
        roentgen.evaluate("gsm9k")
    with pytest.raises(roentgen.RequestError, match=r"capture\.session_id: unknown field; allowed are layers"):
        roentgen.evaluate("arithmetic", capture={"session_id": "s"})
    with pytest.raises(EvalError, match="temperature"):
        roentgen.evaluate("arithmetic", temperature=9)
    with pytest.raises(EvalError, match=r"^max_token: unknown option; did you mean max_tokens\?$"):
        roentgen.evaluate("arithmetic", max_token=9)
    with pytest.raises(EvalError, match=r"model: .*Serving.* is not a model; allowed are a name, .* a running Server"):
        roentgen.evaluate("arithmetic", model=roentgen.serve("smollm2-135m"))


def test_a_server_s_options_are_checked_before_it_starts() -> None:
    with (
        pytest.raises(roentgen.RequestError, match="tempo is unknown"),
        roentgen.serve("smollm2-135m", tempo=1),
    ):
        pass


@pytest.mark.integration
def test_serve_and_evaluate_inside_a_running_loop(
    tmp_path: Path, ray_home: RayHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ray_home.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    async def notebook() -> tuple[roentgen.Run, str]:
        with roentgen.serve("smollm2-135m", dtype="float32", store=str(tmp_path / "store")) as server:
            reply = await server.async_client.chat.completions.create(
                model="smollm2-135m", messages=[{"role": "user", "content": "Say yes."}], max_tokens=4, temperature=0
            )
            assert server.client.models.list().data[0].id == "smollm2-135m"
            run = roentgen.evaluate(
                PROBLEMS, model=server, output=tmp_path / "run", max_tokens=8, parallel=3,
                capture={"layers": [12], "hook_points": ["resid_post"]},
            )  # fmt: skip
            return run, str(reply.choices[0].message.content)

    run, said = asyncio.run(notebook())
    assert said
    assert ray_home.wait_until_gone() == []
    assert len(run.samples) == 3
    assert run.samples["error"].isna().all()
    assert sorted(run.samples["gold"]) == ["1", "2", "3"]
    assert [json.loads(line)["answer"] for line in (tmp_path / "run" / "problems.jsonl").read_text().splitlines()] == [
        "#### 1", "#### 2", "#### 3",
    ]  # fmt: skip
    rows = run.activations("layers.12.resid_post", positions="last_prompt").stack()
    assert rows.shape == (3, 576)
    before = set(threading.enumerate())
    again = roentgen.evaluate(PROBLEMS, model="smollm2-135m", output=run.path, max_tokens=8, dtype="float32", capture={
        "layers": [12], "hook_points": ["resid_post"],
    })  # fmt: skip
    assert again.samples.equals(run.samples)
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name == "stages"] == []
    assert ray_home.wait_until_gone() == []


@pytest.mark.integration
def test_a_loaded_model_is_evaluated_by_a_coroutine(
    model: roentgen.Model, tmp_path: Path, ray_home: RayHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is served from this process; cancelled, it leaves what is finished and nothing else; the same call continues."""
    for name, value in ray_home.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    problems = [{"question": f"{number}?", "answer": number} for number in range(40)]
    settings: dict[str, Any] = {
        "model": model, "output": tmp_path / "run", "store": str(tmp_path / "store"), "max_tokens": 100, "parallel": 2,
        "capture": {"layers": [1], "hook_points": ["resid_post"], "positions": "last_prompt"},
    }  # fmt: skip
    record = tmp_path / "run" / "samples.jsonl"

    async def interrupted() -> None:
        work = asyncio.ensure_future(roentgen.evaluate_async(problems, **settings))
        while not (record.exists() and record.stat().st_size):
            await asyncio.sleep(0.02)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(interrupted())
    assert ray_home.wait_until_gone() == []
    kept = record.read_bytes()
    assert 0 < kept.count(b"\n") < len(problems)
    run = asyncio.run(roentgen.evaluate_async(problems, **settings))
    assert ray_home.wait_until_gone() == []
    assert run.record_path.read_bytes().startswith(kept)
    assert run.samples["error"].isna().all()
    rows = run.activations("layers.1.resid_post", positions="last_prompt")
    (own,) = model.generate(
        [run.read_samples().by_name()[3].messages[:-1]], max_tokens=1,
        capture={"layers": [1], "hook_points": ["resid_post"], "positions": "last_prompt"},
    )  # fmt: skip
    stored = {row.problem_id: item for row, item in zip(rows.rollouts.itertuples(), rows, strict=True)}
    found = stored[run.read_samples().by_name()[3].problem_id]
    torch.testing.assert_close(found.values, own["layers.1.resid_post"], rtol=1e-4, atol=1e-4)
    assert model.generate("a", max_tokens=1)[0].finish_reason == "length"
