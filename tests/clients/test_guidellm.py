"""guidellm, unmodified: a load test in which no request is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from roentgen.defaults import EMBEDDED_MODEL
from serve_app.models.model_source import locate
from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.rotating]
REQUESTS = 6


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_no_request_is_refused(server: Server, tmp_path: Path, route: str) -> None:
    locate(EMBEDDED_MODEL)
    cache = Path(os.environ.get("ROENTGEN_CACHE", Path.home() / ".cache" / "roentgen"))
    tokenizer = cache / "models" / EMBEDDED_MODEL
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            Path(sys.executable).parent / "guidellm", "run", "--disable-console",
            "--backend", f"kind=openai_http,target={server.root},request_format={route}",
            "--profile", "kind=concurrent,streams=2",
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
            "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
            "--output", f"kind=json,path={report}",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert [request["info"]["error"] for request in requests["errored"]] == []
    assert len(requests["successful"]) == REQUESTS
    # It asks for exactly as many tokens as it wants to measure, whatever the model would say.
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {8}
