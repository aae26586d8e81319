"""The output of the GPU benchmark: one line of JSON per part, written as each ends, and the section of RESULTS.md made of
them."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from benchmarks.results_file import conditions, record, replace_section, table
from roentgen.atomic_files import write_text

TITLE = "GPU"
PARTS, SECTION = "parts.jsonl", "section.md"

Status = Literal["ok", "wrong", "failed", "did not fit", "not run"]


@dataclass(frozen=True)
class Part:
    """One part of the benchmark."""

    name: str
    """"environment", "rows", "copies", "load" or "speed"; with "vllm" before it, of that engine."""
    of: str
    """The model, and for "speed" how many in flight; "" where there is none."""
    status: Status
    """How it ended; "wrong" if what it checks does not hold."""
    seconds: float
    """How long it took."""
    result: dict[str, Any] = field(default_factory=dict)
    """What it found."""
    reason: str = ""
    """Why there is no result, or what is wrong."""

    @property
    def title(self) -> str:
        """What the part is called in messages."""
        return f"{self.name} {self.of}".strip()


class GpuReport:
    """Keeps the parts, and writes each when it ends."""

    def __init__(self, folder: Path, results: Path | None) -> None:
        """Begin.

        Args:
            folder: for the files; those of an earlier run are replaced.
            results: the RESULTS.md to keep, None for none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._results = results
        self.parts: list[Part] = []
        (folder / PARTS).write_text("")

    def add(self, part: Part) -> None:
        """Write a part that has ended."""
        self.parts.append(part)
        line = json.dumps(
            {
                "part": part.name,
                "of": part.of,
                "status": part.status,
                "seconds": round(part.seconds, 3),
                "reason": part.reason,
                "result": _finite(part.result),
            },
            allow_nan=False,
        )
        with (self.folder / PARTS).open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        body = section(self.parts)
        write_text(self.folder / SECTION, replace_section("", TITLE, f"{body}\n\n{conditions()}"))
        if self._results is not None:
            record(TITLE, body, self._results)


def _finite(value: Any) -> Any:
    """Return a JSON value in which numbers that JSON cannot write are text."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def section(parts: list[Part]) -> str:
    """Lay out in Markdown what there is so far."""
    pieces = [
        "Both engines on random weights of a Llama's shape. Rows first: those of requests of different lengths that "
        "join and leave a batch, against a teacher-forced forward of the same weights on the same device with plain PyTorch "
        "hooks. An error is the largest distance of a row from that of the float32 forward, relative to its length, over all "
        "hook points; the plain forward's own, in the model's dtype, is the measure of what rounding does. Cosines are the "
        "smallest of a row to the float32 forward's, the engine's and the plain forward's.",
    ]
    checks = [
        part.result | {"status": part.status, "engine": "vllm" if part.name.startswith("vllm") else "transformers"}
        for part in parts
        if part.name.endswith("rows") and part.result
    ]
    if checks:
        header = [
            "engine",
            "model",
            "dtype",
            "rows",
            "engine's error",
            "plain forward's",
            "between the two",
            "cosines",
            "log-probabilities",
            "",
        ]
        pieces.append(table(header, [_check_row(check) for check in checks]))
        pieces += [f"**Wrong**, {part.of}: {problem}." for part in parts for problem in part.result.get("problems", [])]
    copies = [copy for part in parts if part.name == "copies" for copy in part.result.get("sizes", [])]
    if copies:
        pieces.append("From the device to the host, in GB/s:")
        header = ["block", "as the capture does it", "the first time", "pinned memory at hand", "pageable memory"]
        names = ("capture", "first", "pinned", "pageable")
        rows = [[f"{c['nbytes'] / 2**20:,.0f} MiB", *(f"{c[name] / 1e9:.1f}" for name in names)] for c in copies]
        pieces.append(table(header, rows))
    speeds = [part for part in parts if part.name == "speed" and part.result]
    if speeds:
        pieces.append(
            "Tokens per second, reading the prompts included; with capture also as a ratio to the run without, of the same "
            "round (median, and the range of the rounds). A step decoded so many requests together, on average. Memory: "
            "tensors on the device with the weights in them, pinned memory so far, the process."
        )
        header = [
            "model",
            "in flight",
            "a step",
            "captured",
            "tokens/s",
            "ratio",
            "first token",
            "GB/s of rows",
            "GB: GPU, pinned, host",
        ]
        pieces.append(table(header, [_arm_row(part, arm) for part in speeds for arm in part.result["arms"]]))
    beside = [part for part in parts if part.name == "vllm speed" and part.result]
    if beside:
        pieces.append(
            "The vLLM engine, its taps in vLLM's compiled graph and what it captures on the disk within the time measured, "
            "beside plain vLLM with its defaults, in turn. The last columns: shares of a run's time that reading and scoring, "
            "and handing rows over, take of the thread that runs the model, and that the writer's threads compute."
        )
        header = [
            "model",
            "in flight",
            "",
            "tokens/s",
            "against plain",
            "token to token",
            "reading",
            "handing over",
            "writer",
        ]
        pieces.append(table(header, [_beside_row(part, arm) for part in beside for arm in part.result["arms"]]))
    steps = [part for part in parts if part.name == "vllm rows" and part.result]
    pieces += [f"vLLM's steps by the graph that ran them, {part.of}: {part.result['graphs']}." for part in steps]
    missing = [
        f"{part.title}: {part.status}, {part.reason}" for part in parts if part.status != "ok" and not part.result
    ]
    missing += [
        f"{part.title}, capture {arm['capture']}: {arm['skipped']}"
        for part in speeds
        for arm in part.result["arms"]
        if arm["skipped"]
    ]
    return "\n\n".join([*pieces, *(f"- {line}" for line in missing)])


def _check_row(check: dict[str, Any]) -> list[str]:
    keys = check["keys"]
    worst = [f"{max((key[name] for key in keys), default=0.0):.1e}" for name in ("engine", "plain", "apart")]
    alike = ", ".join(f"{min((key[name] for key in keys), default=1.0):.5f}" for name in ("cosine", "plain_cosine"))
    verdict = "right" if check["status"] == "ok" else "**wrong**"
    counted = f"{check['rows']:,}"
    return [
        check["engine"], check["model"], check["dtype"], counted, *worst, alike, f"{check['logprob_error']:.1e}", verdict
    ]  # fmt: skip


def _beside_row(part: Part, arm: dict[str, Any]) -> list[str]:
    model, in_flight = part.of.rsplit(", ", 1)
    ratio = arm["ratio"]
    return [
        model,
        in_flight.removesuffix(" in flight"),
        arm["arm"],
        f"{median(arm['rates']):,.1f}",
        f"{ratio['estimate']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else "–",
        f"{arm['between_s'] * 1e3:.2f} ms",
        *(f"{share:.1%}" for share in arm["shares"].values()),
    ]


def _arm_row(part: Part, arm: dict[str, Any]) -> list[str]:
    model, in_flight = part.of.rsplit(", ", 1)
    together = f"{arm['rows_per_step']:.1f}" if arm["rates"] else "–"
    start = [model, in_flight.removesuffix(" in flight"), together, arm["capture"]]
    if not arm["rates"]:
        return [*start, "–", "–", "–", "–", "–"]
    ratio, seconds = arm["ratio"], arm["tokens"] / arm["rate"]
    memory = [arm["device_bytes"], arm["pinned_bytes"], arm["host_bytes"]]
    return [
        *start,
        f"{arm['rate']:,.1f}",
        f"{ratio['estimate']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else "–",
        f"{arm['first_token_s']:.3f} s",
        f"{arm['captured_bytes'] / seconds / 1e9:.2f}" if arm["captured_bytes"] else "–",
        ", ".join("–" if size is None else f"{size / 1e9:.1f}" for size in memory),
    ]
