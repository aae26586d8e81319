"""Sessions and runs in a bucket, at a real S3 endpoint, look as they do on a disk."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from roentgen.runs import Run
from roentgen.store.storage_backends import open_folder
from tests.roentgen.view.conftest import KEYS, asker, source_ids
from tests.s3 import BUCKET, ENVIRONMENT, s3_endpoint


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_endpoint(tmp_path / "moto.log") as endpoint:
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint}).items():
            monkeypatch.setenv(name, value)
        yield f"s3://{BUCKET}/{tmp_path.name}"


def upload(folder: Path, address: str) -> None:
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        inside = "/".join(file.parent.relative_to(folder).parts)
        open_folder(f"{address}/{inside}" if inside else address).put(file.name, [file.read_bytes()])


def test_they_look_the_same(run: Run, bucket: str) -> None:
    upload(run.path, f"{bucket}/runs/run")
    upload(run.path / "activations" / "session", f"{bucket}/store/session")
    there, here = asker(f"{bucket}/runs", f"{bucket}/store"), asker(run.path, run.path / "activations")
    far, near = source_ids(there), source_ids(here)
    for kind, sample in (("run", "gsm8k_0003"), ("session", "rollout-00002")):
        a, b = f"/api/sources/{far[kind]}", f"/api/sources/{near[kind]}"
        for question in ({}, {"q": "cde"}, {"q": "IT IS 3"}, {"sort": "-sample_id", "limit": 3}):
            assert there(f"{a}/samples", **question) == here(f"{b}/samples", **question)
        for what in ("tokens", f"values?of=norm:{KEYS[1]}", "values?of=logprob", "token/2?of=norm"):
            assert there(f"{a}/samples/{sample}/{what}") == here(f"{b}/samples/{sample}/{what}")
        assert [probe["name"] for probe in there(a)["probes"]] == [probe["name"] for probe in here(b)["probes"]]
    line = run.record_path.read_bytes().splitlines(keepends=True)[0]
    with open(run.record_path, "ab") as file:
        file.write(line.replace(b"gsm8k_0001", b"gsm8k_0044").replace(b"problem-0", b"new"))
    upload(run.path, f"{bucket}/runs/run")
    fresh: Callable[..., Any] = asker(f"{bucket}/runs")
    assert fresh(f"/api/sources/{far['run']}/samples")["total"] == 9
