"""npm's `openai` and `ai`, unmodified: the scripts beside their package.json, each run once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.asked import KEY, MODEL, QUESTION, SUM, Answer, Weather, keep, stored
from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.rotating]
NODE = Path(__file__).parent / "node"


def said(server: Server, script: str) -> Any:
    """Run a script on the server; return what it printed."""
    asked = {
        "base_url": server.base_url, "model": MODEL, "question": QUESTION, "sum": SUM,
        "parameters": {**Weather.model_json_schema(), "additionalProperties": False}, "keep": keep(script),
    }  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["node", NODE / f"{script}.mjs", json.dumps(asked)]
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", ["openai", "ai"])
def test_streams_tools_typed_answers_and_activations(server: Server, script: str) -> None:
    found = said(server, script)
    assert found["texts"][0]
    assert set(found["texts"]) == {found["texts"][0]}
    for call in found["calls"]:
        Weather.model_validate_json(call)
    for answer in found["answers"]:
        Answer.model_validate(answer)
    for result, words in found.get("histories", []):
        assert result.startswith("snow in ")
        assert words
    assert found["kept"]
    assert all(keys == [KEY] for keys in found["kept"])
    assert stored(server.store, script) >= len(found["kept"])
