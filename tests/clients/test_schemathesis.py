"""schemathesis, unmodified, on /openapi.json: thousands of requests made from the document, each reply held against it."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SECONDS = 180
IN_TURNS = 60
"""The same where tests take turns: CI."""
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "events_are_openais",  # these two are in schemathesis_hooks
    "status_is_one_of_ours",
)


def test_every_reply_is_as_documented(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seconds = SECONDS if request.config.getoption("share") == 1 else IN_TURNS
    counted = tmp_path / "statuses.json"
    hooks = {"SCHEMATHESIS_HOOKS": "tests.clients.schemathesis_hooks", "STATUSES": str(counted)}
    done = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis", "run", f"{server.root}/openapi.json",
            "--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", "--max-examples", "400",
            "--max-time", str(seconds), "--workers", "1", "--seed", "1", "--request-timeout", "60",
            "--continue-on-failure", "--generation-database", "none", "--no-color", "--warnings", "off",
        ],
        env={**os.environ, **hooks, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds + 240,
    )  # fmt: skip
    statuses: dict[str, int] = json.loads(counted.read_text())
    by_route: Counter[str] = Counter()
    for key, count in sorted(statuses.items()):
        print(f"{count:6} {key}")
        by_route[key.rpartition(" ")[0]] += count
    assert done.returncode == 0, done.stdout[-10_000:]
    assert sum(by_route.values()) >= 1000 * seconds / SECONDS  # as many as the machine manages in the time
    assert not [key for key in statuses if key.rpartition(" ")[2].startswith("5")]
    for route in (
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "POST /tokenize",
        "POST /detokenize",
    ):
        assert statuses[f"{route} 200"] > 0.02 * by_route[route], route
