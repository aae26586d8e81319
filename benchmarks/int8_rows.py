"""The effect of int8 rows on probes: `python -m benchmarks.int8_rows RUN`.

The rows of a run with activations are read and written again as int8, and probes are trained on both with the same folds,
so that only the rounding differs. The run may be that of `make demo`.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from ulid import ULID

from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from probes import ProbeReport, train
from roentgen.contract import RolloutKey
from roentgen.runs import Run
from roentgen.runs.stored import StoredRollouts, find_rollouts
from roentgen.store import CapturedRollout, CaptureSpec, Session, StoreWriter
from roentgen.store.quantization import QUANTIZED
from roentgen.store.sessions import summarize_session
from roentgen.tokenized_text import Segment, TokenizedText

SESSION = "int8"


@dataclass(frozen=True)
class Cost:
    """What rounding did to one key."""

    key: str
    """The key."""
    relative: float
    """The length of a row's error, relative to the row, in the median."""
    cosine: float
    """Between a row and what was read back, the smallest."""


def main(
    run: Annotated[Path, typer.Argument(help="A run directory with activations of one session.")],
    label: Annotated[str, typer.Option(help="What the probes read.")] = "correct",
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure what int8 rows cost probes."""
    stage = stage_printer()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        opened = Run(run)
        parts = find_rollouts(opened, [sample for sample in opened.read_samples() if sample.error is None])
        stage("writing the rows again as int8")
        costs = requantize(parts, folder)
        sizes = tuple(
            summarize_session(session.folder).bytes for session in (parts[0].session, Session.open(folder / SESSION))
        )
        reports = {
            name: train(run, label, session=session, output=folder / name, stage=stage)
            for name, session in (("stored", None), ("int8", folder / SESSION))
        }
    body = report(opened, reports["stored"], reports["int8"], costs, sizes)
    print(body)
    if write:
        record("int8 rows: what they cost a probe", body)


def requantize(parts: list[StoredRollouts], folder: Path) -> list[Cost]:
    """Write rollouts again as int8 rows, into one session, and compare what is read back."""
    with StoreWriter(folder) as writer:
        for part in parts:
            for rollout in _rollouts(part):
                writer.wait_for_room()
                writer.submit(rollout)
    again = Session.open(folder / SESSION)
    costs = []
    for key in again.keys():  # noqa: SIM118 - no dict
        there = {item.rollout_id: item.values for item in again.activations(key)}
        before = [item for part in parts for item in part.session.activations(key, where=part.rollouts)]
        old = torch.cat([item.values.float() for item in before])
        new = torch.cat([there[item.rollout_id] for item in before])
        relative = (new - old).norm(dim=1) / old.norm(dim=1)
        cosine = torch.nn.functional.cosine_similarity(new, old, dim=1)
        costs.append(Cost(key, float(relative.median()), float(cosine.min())))
    return costs


def _rollouts(part: StoredRollouts) -> "list[CapturedRollout]":
    """Read a part's rollouts whole, to be stored as int8."""
    ids = part.rollouts["rollout_id"].tolist()
    rows = {row["rollout_id"]: row for row in part.session.rollouts(ids=ids).to_dict("records")}
    found = []
    for rollout_id in ids:
        row = rows[rollout_id]
        shard = part.session.shard(row["shard"])
        start, stop = int(row["row_start"]), int(row["row_stop"])
        position = shard.column("position")[start:stop]
        logprobs = np.full(len(row["token_ids"]), np.nan, dtype=np.float32)
        logprobs[position[position >= 0]] = shard.column("logprob")[start:stop][position >= 0]
        spec: CaptureSpec = shard.spec.model_copy(update={"dtype": QUANTIZED})
        found.append(
            CapturedRollout(
                session_id=SESSION,
                rollout_id=rollout_id or str(ULID()),
                spec=spec,
                tensors={key: shard.values(key, np.arange(start, stop)) for key in spec.keys},
                position=position,
                sequence=TokenizedText(
                    row["text"], [int(t) for t in row["token_ids"]], [int(o) for o in row["token_offsets"]],
                    [Segment(s["role"], int(s["start"]), int(s["stop"])) for s in row["segments"]], int(row["n_prompt"]),
                ),
                logprobs=logprobs,
                finish_reason=row["finish_reason"],
                key=RolloutKey(
                    config_hash=row["config_hash"], problem_id=row["problem_id"], epoch=int(row["epoch"]), turn=int(row["turn"])
                ),
                labels=row["labels"],
            )
        )  # fmt: skip
    return found


def report(run: Run, stored: ProbeReport, rounded: ProbeReport, costs: list[Cost], sizes: tuple[int, ...]) -> str:
    """Lay out what was measured."""
    of_key = {cost.key: cost for cost in costs}
    rows, losses = [], []
    for one, other in zip(stored.results, rounded.results, strict=True):
        loss = one.estimate.value - other.estimate.value
        losses.append(loss)
        cost = of_key[one.key]
        rows.append([
            f"`{one.key}`", f"{one.estimate.value:.4f}", f"{other.estimate.value:.4f}", f"{loss:+.4f}", f"{cost.relative:.2%}",
            f"{cost.cosine:.5f}",
        ])  # fmt: skip
    text = (
        f"{stored.n_samples} samples of `{run.config.hashed['model']}` on `{Path(run.config.problems['source']).name}`, label "
        f"`{stored.label}`, probes at the last token of the prompt; the same rows as stored and as int8, the same folds. "
        f"{stored.metric.upper()} of the best: {stored.best.estimate} and {rounded.best.estimate}. Loss over the keys: "
        f"{np.mean(losses):+.4f} in the mean, {max(losses):+.4f} at most. The shards have {sizes[0] / 1e6:,.1f} and "
        f"{sizes[1] / 1e6:,.1f} MB. Error: the length of a row's error by that of the row, in the median over all rows."
    )
    header = ["key", "as stored", "int8", "loss", "error", "least cosine"]
    return f"{text}\n\n{table(header, rows)}"


if __name__ == "__main__":
    typer.run(main)
