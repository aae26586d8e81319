"""A run given away is read back by `datasets` alone, without a network: every sample, token, verdict and number of it."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from roentgen.cli import app
from roentgen.store import Session, StoreError, StoreWriter
from roentgen.workflows import dataset_tables
from roentgen.workflows.dataset_card import evaluation_command
from roentgen.workflows.dataset_export import ExportError, export_dataset, push
from tests.roentgen.store.conftest import KEYS, RolloutFactory
from tests.roentgen.workflows.conftest import FAILED, MakeRun

RUNNER = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail whatever would reach for another machine."""

    def refuse(*asked: object) -> None:
        raise AssertionError(f"the network was used: {asked}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load(folder: Path, name: str, cache: Path) -> Any:
    return datasets.load_dataset(str(folder), name, split="train", cache_dir=str(cache))


@pytest.mark.usefixtures("no_network")
def test_everything_is_read_back_with_datasets_alone(make_run: MakeRun, tmp_path: Path) -> None:
    kept = make_run()
    folder, cache = tmp_path / "given", tmp_path / "cache"
    done = RUNNER.invoke(app, ["export", str(kept.run.path), str(folder), "--format", "hf"])
    assert done.exit_code == 0, done.output
    assert "5 samples, 5 rollouts, " in done.output
    samples = {row["sample_id"]: row for row in load(folder, "samples", cache)}
    recorded = {sample.sample_id: sample for sample in kept.run.read_samples()}
    assert list(samples) == [f"gsm8k_000{number}" for number in range(1, 6)]
    assert samples[f"gsm8k_000{FAILED}"]["correct"] is None
    for name, sample in recorded.items():
        assert samples[name]["response"] == sample.response
        assert samples[name]["correct_flexible"] == sample.correct_by.get("flexible")
        assert samples[name]["session"] in ("s", None)  # not where it was on this machine
    rollouts = {(row["sample_id"], row["turn"]): row for row in load(folder, "rollouts", cache)}
    assert set(rollouts) == set(kept.rollouts)
    for identity, made in kept.rollouts.items():
        row = rollouts[identity]
        assert row["token_ids"] == made.sequence.token_ids
        assert (row["text"], "".join(row["tokens"])) == (made.sequence.text, made.sequence.text)
        assert json.loads(row["labels"]) == made.labels
        assert (row["verdict"], row["correct"]) == {
            "gsm8k_0001": ("correct", True),
            "gsm8k_0002": ("wrong", False),
            "gsm8k_0003": ("correct", True),
            "gsm8k_0004": ("no_answer", False),
        }[identity[0]]
    for key in KEYS:
        rows = load(folder, key, cache).with_format("numpy")[:]
        for (name, turn), made in kept.rollouts.items():
            own = (rows["sample_id"] == name) & (rows["turn"] == turn)
            np.testing.assert_array_equal(rows["values"][own], made.tensors[key].float().numpy())
            assert rows["position"][own].tolist() == made.position.tolist()
            assert rows["token_id"][own].tolist() == [made.sequence.token_ids[at] for at in made.position]
            assert rows["generated"][own].tolist() == (made.position >= made.sequence.n_prompt).tolist()
            np.testing.assert_array_equal(
                np.isnan(rows["logprob"][own].astype(float)), np.isnan(made.logprobs[made.position])
            )
        assert len(rows["values"]) == sum(made.n_rows for made in kept.rollouts.values())


def test_the_card_says_how_it_was_made(make_run: MakeRun, tmp_path: Path) -> None:
    kept = make_run()
    exported = export_dataset(kept.run, tmp_path / "given")
    text = (tmp_path / "given/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert [config["config_name"] for config in facts["configs"]] == ["samples", "rollouts", *KEYS]
    assert facts["size_categories"] == ["n<1K"]
    hashed = kept.run.config.hashed
    rows = sum(made.n_rows for made in kept.rollouts.values())
    for said in (
        hashed["prompt"]["hash"],
        "`m`",
        "revision | `r`",
        kept.run.config.config_hash,
        "`resid_post` at layers 1, 2",
        f"rows per key | {rows:,}",
        "torch.bfloat16",
        f"bytes | {exported.nbytes:,}",
        "`roentgen export run given --format hf`",
        "roentgen eval --samples 5 --layers 1,2 --hook-points resid_post --collect-activations",
        "4, and 1 that failed",
    ):
        assert said in body
    assert str(tmp_path) not in text
    assert sum(p.stat().st_size for p in (tmp_path / "given").rglob("*.parquet")) == exported.nbytes
    # The card's own lines load it.
    (code,) = [part.removeprefix("python\n") for part in body.split("```") if part.startswith("python\n")]
    space: dict[str, Any] = {}
    exec(code.replace("…", str(tmp_path / "given")), space)
    assert space["X"].shape == (rows, 8)
    assert len(space["y"]) == rows


def test_a_run_without_activations_is_its_samples(make_run: MakeRun, tmp_path: Path) -> None:
    export_dataset(make_run(keys=()).run, tmp_path / "given")
    assert sorted(path.name for path in (tmp_path / "given").iterdir()) == ["README.md", "rollouts", "samples"]
    assert pq.read_table(tmp_path / "given/rollouts").num_rows == 0
    assert "no activations were kept" in (tmp_path / "given/README.md").read_text()


def test_another_session_of_the_answers(make_run: MakeRun, tmp_path: Path, rollout: RolloutFactory) -> None:
    kept = make_run(keys=())
    sample = next(sample for sample in kept.run.read_samples() if sample.error is None)
    made = rollout(4, 3, session="again", keys=("embed",), positions="mean_prompt", dtype=torch.float32)
    made = made.__class__(**{
        **{name: getattr(made, name) for name in made.__dataclass_fields__},
        "tensors": {"embed": torch.randn(1, 8)}, "position": np.array([-1], dtype=np.int32),
        "key": _key(sample),
    })  # fmt: skip
    with StoreWriter(tmp_path / "store") as writer:
        uri = writer.submit(made).result().uri
    done = RUNNER.invoke(
        app, ["export", str(kept.run.path), str(tmp_path / "given"), "--format", "hf", "--session", uri]
    )
    assert done.exit_code == 0, done.output
    (row,) = pq.read_table(tmp_path / "given/embed").to_pylist()
    assert (row["sample_id"], row["position"], row["token"], row["token_id"]) == (sample.sample_id, -1, None, None)
    assert row["values"] == made.tensors["embed"][0].tolist()


def _key(sample: Any) -> Any:
    from roentgen.contract import RolloutKey

    return RolloutKey(config_hash=sample.config_hash, problem_id=sample.problem_id)


HALVES = st.integers(0, 2**16 - 1).map(lambda bits: float(np.uint16(bits).view(np.float16))).filter(np.isfinite)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.lists(HALVES, min_size=3, max_size=3), min_size=1, max_size=6),
    group=st.integers(1, 100),
)
def test_rows_are_the_stored_numbers(
    values: list[list[float]], group: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_tables, "GROUP_BYTES", group)
    monkeypatch.setattr(dataset_tables, "FILE_BYTES", 4 * group)
    folder = tmp_path_factory.mktemp("x")
    rollout = RolloutFactory()
    with StoreWriter(folder) as writer:
        made = []
        for row in values:
            one = rollout(1, 1, keys=("embed",), dtype=torch.float16, d=3)
            one.tensors["embed"][0] = torch.tensor(row)
            made.append(one)
        uri = [writer.submit(one) for one in made][-1].result().uri
    session = Session.open(uri)
    frame = session.rollouts(columns=()).set_index("rollout_id", drop=False).loc[[one.rollout_id for one in made]]
    names = [f"s{n}" for n in range(len(made))]
    part = dataset_tables.StoredRollouts(session, frame.reset_index(drop=True), names, [0] * len(made))
    judged = {name: dataset_tables.Judged(name, name, 1, None, "1", True, "correct") for name in names}
    (folder / "out").mkdir()
    dataset_tables.write_rollouts([part], judged, folder / "out")
    written = dataset_tables.write_rows([part], "embed", folder / "out")
    table = pq.read_table(folder / "out/embed")
    assert table.column("values").to_pylist() == [torch.tensor(row, dtype=torch.float16).tolist() for row in values]
    assert table.column("sample_id").to_pylist() == names
    assert written.rows == len(values)


def test_what_is_half_written_is_not_there(make_run: MakeRun, tmp_path: Path) -> None:
    kept = make_run()
    shard = next((tmp_path / "store/s/shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:100])
    before = set(tmp_path.iterdir())
    with pytest.raises(StoreError, match="damaged"):
        export_dataset(kept.run, tmp_path / "given")
    assert set(tmp_path.iterdir()) == before


def test_refusals_name_what_to_do(make_run: MakeRun, tmp_path: Path) -> None:
    kept = make_run(keys=())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(ExportError, match="full exists and is not empty; choose another folder"):
        export_dataset(kept.run, tmp_path / "full")
    run = str(kept.run.path)
    done = RUNNER.invoke(app, ["export", run, str(tmp_path / "x.parquet"), "--public"])
    assert done.exit_code == 2
    assert "public: allowed only with format hf; the format is parquet" in done.output
    done = RUNNER.invoke(app, ["export", run, str(tmp_path / "folder")])
    assert "'folder' has no known extension; allowed are .parquet, .eval, .html, and format hf" in done.output


def test_the_command_is_spelled_with_what_differs(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(keys=()).run.config
    changed = config.model_copy(
        update={"settings": config.settings | {"problems": "/home/me/mine.jsonl", "temperature": 0.5, "shuffle": True}}
    )
    spelled = evaluation_command(changed)
    assert "--problems mine.jsonl" in spelled
    assert "--temperature 0.5" in spelled
    assert "--shuffle" in spelled
    assert "base-url" not in spelled


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files takes."""

    asked: list[tuple[str, Any]]
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines()]
        type(self).asked.append((self.path, lines))
        host = f"http://{self.headers['Host']}"
        if self.refuse:
            self._answer({"error": "no"}, 403)
        elif self.path == "/api/repos/create":
            self._answer({"url": f"{host}/datasets/me/mine", "name": "me/mine", "id": "1"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
            ]
            self._answer({"files": files})
        else:
            self._answer({"commitUrl": f"{host}/datasets/me/mine/commit/1", "commitOid": "1", "success": True})

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self._answer([])
        else:
            self._answer({"id": "me/mine", "sha": "0", "siblings": []})

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    kind = type("Hub", (_Hub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield kind
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_folder_is_sent_to_the_hub(make_run: MakeRun, tmp_path: Path, hub: type[_Hub]) -> None:
    kept = make_run(keys=())
    done = RUNNER.invoke(app, ["export", str(kept.run.path), str(tmp_path / "given"), "--push", "me/mine"])
    assert done.exit_code == 0, done.output
    assert "/datasets/me/mine/commit/1" in done.output
    created = next(lines[0] for path, lines in hub.asked if path == "/api/repos/create")
    assert (created["name"], created["type"]) == ("mine", "dataset")
    assert created.get("private") is True or created.get("visibility") == "private"
    (committed,) = [lines for path, lines in hub.asked if "/commit/" in path]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in committed if line["key"] == "file"
    }
    here = {
        str(path.relative_to(tmp_path / "given")): path.read_bytes()
        for path in (tmp_path / "given").rglob("*")
        if path.is_file()
    }
    assert sent == here


def test_a_refused_upload_says_how_to_send_it_again(make_run: MakeRun, tmp_path: Path, hub: type[_Hub]) -> None:
    export_dataset(make_run(keys=()).run, tmp_path / "given")
    hub.refuse = True
    with pytest.raises(ExportError, match=r"'me/mine' was not uploaded: .*hf upload me/mine .* --repo-type dataset"):
        push(tmp_path / "given", "me/mine")
    with pytest.raises(ExportError, match="was not uploaded"):
        push(tmp_path / "given", "not a/name")
