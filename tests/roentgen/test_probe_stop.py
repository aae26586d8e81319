"""`roentgen.probes.stop` over a real store: what is found, left on disk and said, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import OpenAI

import roentgen
from probes import ProbeDataError
from roentgen.contract import RolloutKey, StoredTensor
from roentgen.linear_probe import ProbeCard, SavedProbe, SavedProbeError, save_probes
from roentgen.options import OptionError
from roentgen.runs import RolloutRef, Run, RunConfig, Sample, create_run, recording
from roentgen.stop_rule import find_stop
from roentgen.store import CapturedRollout, CaptureSpec, StoreWriter
from roentgen.tokenized_text import Segment, TokenizedText
from tests.conftest import Server

KEY, WIDTH = "layers.1.resid_post", 256


def card(key: str = KEY) -> ProbeCard:
    return ProbeCard(
        model="m", revision="r", key=key, positions="last", kind="logistic", label="written", target="binary", strength=1,
        folds=5, metrics={}, data_hash="c0ffee", seed=0, roentgen="0.1.0",
    )  # fmt: skip


def probe(key: str = KEY, outputs: int = 1) -> SavedProbe:
    """It reads the first feature."""
    weight = torch.eye(WIDTH)[:1].repeat(outputs, 1)
    return SavedProbe(weight, torch.zeros(outputs), torch.zeros(WIDTH), torch.ones(WIDTH), card(key))


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Run]:
    """A run whose tokens are characters: an answer, and then talk; the first feature tells that it has been written."""

    def write(n: int = 60, positions: str = "all", thinks: bool = False, mode: str = "no-tools") -> Run:
        run = create_run(tmp_path / "run", RunConfig(
            run_id="run", created="2025-01-01T00:00:00Z", config_hash="c0ffee", hashed={"mode": mode}, problems={},
            settings={"extractor": "answer"}, prompt={}, versions={},
        ))  # fmt: skip
        spec = CaptureSpec(model="m", revision="r", keys=(KEY,), positions=positions, dtype="torch.float32")
        generator = torch.Generator().manual_seed(0)
        samples: list[tuple[dict[str, Any], Any]] = []
        with StoreWriter(run.path / "activations", max_wait_s=0.01) as writer:
            for number in range(n):
                answer = f"{'So. ' * (number % 5)}The answer is {number}."
                said = f"{answer}{' That is it, I think.' * (number % 4)}"
                pieces = list(said)
                if thinks:
                    pieces = ["<think>", *pieces, "</think>", *f"The answer is {number}."]
                text, offsets = "", [0, 1]
                for piece in ("Q", "?", *pieces):
                    offsets.append(len(text) + len(piece))
                    text += piece
                offsets = [0, *np.cumsum([1, 1, *map(len, pieces)]).tolist()][:-1]
                n_rows = 2 + len(pieces) - 1
                rows = torch.randn(n_rows, WIDTH, generator=generator) * 0.8
                rows[2 + len(answer) - 1 + thinks :, 0] += 6
                kept = slice(None) if positions == "all" else slice(1, 2)
                ids = [ord(piece) if len(piece) == 1 else 1000 + len(piece) for piece in ("Q", "?", *pieces)]
                sequence = TokenizedText(text, ids, offsets, [Segment("user", 0, 2)], 2)
                rollout = CapturedRollout(
                    session_id="s", rollout_id=f"rollout-{number:05}", spec=spec, tensors={KEY: rows[kept].contiguous()},
                    position=np.arange(n_rows)[kept], sequence=sequence, logprobs=np.zeros(len(ids)), finish_reason="stop",
                    key=RolloutKey(config_hash="c0ffee", problem_id=f"p{number}"),
                )  # fmt: skip
                fields = {
                    "sample_id": f"x_{number:04}", "problem_id": f"p{number}", "config_hash": "c0ffee",
                    "question": f"What is {number}?", "solution": "!", "gold": str(number), "correct": True,
                    "response": f"The answer is {number}." if thinks else said, "finish_reason": "stop",
                    "prompt_tokens": 2, "completion_tokens": len(pieces),
                    "messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": said}],
                }  # fmt: skip
                samples.append((fields, writer.submit(rollout)))
            receipts = [(fields, future.result()) for fields, future in samples]
        with recording(run) as record:
            for fields, receipt in receipts:
                tensor = StoredTensor(shape=(1, WIDTH), dtype="torch.float32", stored_path=receipt.shard)
                ref = RolloutRef(
                    turn=0, session_id="s", rollout_id=receipt.rollout_id, uri=receipt.uri, shard=receipt.shard,
                    row_start=receipt.row_start, row_stop=receipt.row_stop, tensors={KEY: tensor},
                )  # fmt: skip
                record.append(Sample.model_validate({**fields, "rollouts": [ref]}))
        return run

    return write


def test_a_probe_that_knows_saves_tokens_at_no_loss_and_a_random_direction_does_not(
    write_run: Callable[..., Run],
) -> None:
    run = write_run()
    save_probes(run.path / "probes" / "written", [probe()])
    report = roentgen.probes.stop(run, run.path / "probes" / "written" / f"{KEY}@last", controls=2)
    assert (report.samples, report.problems, report.seen) == ((30, 30), (30, 30), True)
    own = report.probes_own
    assert own is not None
    assert (own.accuracy.value, own.change.value) == (1, 0)
    assert own.saved.low > 0.2
    assert 0.5 < own.stopped < 1  # the others had nothing more to say
    assert own.setting.length == 1
    assert report.stop_when == {"above": own.setting.above, "for": 1, "where": "generated", "then": "stop"}
    for one in report.chosen:
        if one.kind == "random":
            assert (
                one.finding is None or one.finding.saved.value < own.saved.value / 2 or one.finding.accuracy.value < 0.9
            )
        if one.kind == "fixed_length":
            assert one.finding is None or one.finding.saved.value < own.saved.value
    folder = run.path / "stopping" / "written" / f"{KEY}@last"
    assert sorted(path.name for path in folder.iterdir()) == ["stopping.html", "stopping.json", "stopping.png"]
    told = json.loads((folder / "stopping.json").read_text())
    assert told["stop_when"] == report.stop_when
    assert len(told["findings"]) == len(report.findings)
    assert "trained on problems of this run" in " ".join(told["notes"])
    page = (folder / "stopping.html").read_text()
    assert str(own.saved) in page
    assert "answer convergence" in page
    # The control: rows that are one token late do not stop at the answer.
    text = "The answer is 7. That"
    scores = np.array([0.0] * 15 + [3.0] * 5, dtype=np.float32)
    counted = np.ones(len(scores), dtype=bool)
    assert text[: 1 + (find_stop(scores, counted, 1.5, 1)[0] or 0)].endswith("7.")
    assert not text[: 1 + (find_stop(np.roll(scores, 1), counted, 1.5, 1)[0] or 0)].endswith("7.")


def test_the_reasoning_alone_counts_where_it_is_to_be_closed(write_run: Callable[..., Run]) -> None:
    report = roentgen.probes.stop(
        write_run(thinks=True), probe(), then="close_reasoning", above="3.5", lengths="1,2", controls=0
    )
    own = report.probes_own
    assert own is not None
    assert report.where == "reasoning"
    assert own.accuracy.value == 1
    assert own.saved.low > 0.1
    assert own.setting.above == 3.5
    assert "confirm measures it" in " ".join(report.notes())
    assert not report.seen


@pytest.mark.parametrize(
    ("written", "asked", "error", "message"),
    [
        ({"positions": "last_prompt"}, {}, ProbeDataError, "were not stored; evaluate again with positions all"),
        ({"n": 1}, {}, ProbeDataError, "answers to one problem only"),
        ({"mode": "with-tools"}, {}, ProbeDataError, "used tools"),
        ({}, {"probe": probe("layers.9.resid_post")}, ProbeDataError, r"no rows of layers\.9\.resid_post; it has layers\.1"),
        ({}, {"probe": probe(outputs=3)}, ProbeDataError, "has 3 outputs"),
        ({}, {"where": "reasoning"}, ProbeDataError, "no answer of .* contains reasoning between <think> and </think>"),
        ({}, {"probe": None}, SavedProbeError, "has no saved probes of 'correct'"),
        ({}, {"lengths": "0"}, OptionError, "lengths"),
        ({}, {"above": "1,x"}, OptionError, "above.*not a comma-separated list of numbers"),
        ({}, {"max_loss": 2}, OptionError, "max_loss"),
        ({}, {"length": 2}, OptionError, "length: unknown option; did you mean lengths"),
        ({}, {"then": "close_reasoning", "where": "generated"}, OptionError, "must be reasoning"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(
    write_run: Callable[..., Run], written: dict[str, Any], asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    run = write_run(**{"n": 6, **written})
    with pytest.raises(error, match=message):
        roentgen.probes.stop(run, **{"probe": probe(), **asked})


@pytest.mark.integration
@pytest.mark.rotating
def test_a_server_stops_where_the_stored_rows_say(server: Server, tmp_path: Path) -> None:
    """A random direction, so that some answers end early; greedy, in float32: every answer has the length that was swept."""
    run = roentgen.evaluate(
        "arithmetic", samples=12, model=server.base_url, max_tokens=32, output=tmp_path / "run", parallel=4,
        capture={"layers": [15], "hook_points": ["resid_post"]},
    )  # fmt: skip
    models = OpenAI(base_url=server.base_url, api_key="none").models.list().data[0]
    rows = run.activations("layers.15.resid_post", "generated")
    every = torch.cat([item.values.float() for item in rows])
    weight = torch.randn(1, 576, generator=torch.Generator().manual_seed(1))
    known = card("layers.15.resid_post").model_copy(update={"model": models.id, "revision": models.revision})
    read = SavedProbe(weight, torch.zeros(1), every.mean(0), every.std(0) + 0.1, known)
    report = roentgen.probes.stop(run, read, max_loss=1.0, controls=0, confirm=True, base_url=server.base_url)
    assert report.live is not None
    assert report.live.same_length == 1
    assert report.live.stopped == report.probes_own.stopped > 0
    assert report.live.accuracy.value == report.probes_own.accuracy.value
    lines = (run.path / "stopping" / "" / f"{read.card.name}" / "live.jsonl").read_text().splitlines()
    assert len(lines) == report.samples[1]
    assert "the probe, live" in (Path(report.folder) / "stopping.html").read_text()
