"""An evaluation from a script: its arguments, and with a real server the whole of it, also inside a running event loop."""

import asyncio
import json
from pathlib import Path

import pytest

import roentgen
from eval_jobs import EvalError
from eval_jobs.settings import check_settings
from roentgen.api.evaluating import _server
from roentgen.serving.for_evaluation import config_for
from tests.conftest import RayHome

PROBLEMS = [{"question": f"What is {number} + 1?", "answer": number + 1} for number in range(3)]


def test_arguments_that_cannot_be_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"problems\[1\]: a problem has a 'question', a text, and an 'answer'"):
        roentgen.evaluate([PROBLEMS[0], {"question": "?"}], output=tmp_path / "run")
    with pytest.raises(EvalError, match="problems: the list is empty"):
        roentgen.evaluate([], output=tmp_path / "run")
    with pytest.raises(EvalError, match="unknown; allowed are arithmetic, gsm8k"):
        roentgen.evaluate("gsm9k")
    with pytest.raises(roentgen.RequestError, match=r"capture\.session_id is unknown; allowed are layers"):
        roentgen.evaluate("arithmetic", capture={"session_id": "s"})
    with pytest.raises(EvalError, match="temperature"):
        roentgen.evaluate("arithmetic", temperature=9)


def test_a_loaded_model_is_served_as_it_was_loaded(model: roentgen.Model, folder: Path) -> None:
    settings = check_settings(**{name: value for name, value in _server(model).items() if value is not None})
    config = config_for(settings)
    assert (config.model, config.dtype, config.device) == (str(folder), "float32", "cpu")


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
    again = roentgen.evaluate(PROBLEMS, model="smollm2-135m", output=run.path, max_tokens=8, dtype="float32", capture={
        "layers": [12], "hook_points": ["resid_post"],
    })  # fmt: skip
    assert again.samples.equals(run.samples)
    assert ray_home.wait_until_gone() == []
