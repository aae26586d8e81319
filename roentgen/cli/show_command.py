"""`roentgen show`: print one sample of a run."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roentgen.cli.console import expected_errors, out, table_of

if TYPE_CHECKING:
    from roentgen.workflows.sample_details import ProbeScore, SampleDetails, StoredRows


def show(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    sample: Annotated[str, typer.Argument(help="Sample number, sample id or problem id: 7, gsm8k_0007.")],
    epoch: Annotated[int | None, typer.Option(min=1, help="Epoch (attempt). Default: the first.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant. Default: the first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print one sample: prompt, answer, verdicts, the location of its activations, and its probe scores."""
    from roentgen.api.run_results import show as show_sample

    with expected_errors():
        shown = show_sample(run, sample, epoch=epoch, variant=variant)
    if as_json:
        out.print_json(data=_as_json(shown))
        return
    _print_conversation(shown)
    _print_verdicts(shown)
    for stored in shown.stored:
        _print_rows(stored)
    if not shown.stored:
        _print(f"rows: {shown.lost or 'none were stored'}")
    for score in shown.scores:
        _print(f"probe {score.label}: {_format_score(score)}")
    if shown.others:
        _print(f"also: {', '.join(shown.others)} (--epoch, --variant)")


def _as_json(shown: "SampleDetails") -> dict[str, Any]:
    return {
        **asdict(shown),
        "sample": shown.sample.model_dump(mode="json", exclude={"rollouts"}),
        "scores": [{**asdict(score), "probability": score.probability} for score in shown.scores],
    }


def _print(text: str, style: str = "") -> None:
    out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_conversation(shown: "SampleDetails") -> None:
    sample = shown.sample
    verdict = shown.verdicts.get(shown.primary) or "failed"
    attempt = f"epoch {sample.epoch}" + (f", variant {sample.variant}" if sample.variant else "")
    _print(f"{sample.sample_id}  {sample.problem_id}, {attempt}: {verdict}", style="bold")
    for message in sample.messages:
        _print(f"── {message['role']}", style="dim")
        if message.get("reasoning_content"):
            _print(message["reasoning_content"], style="italic")
        _print(message.get("content") or "")
        for call in message.get("tool_calls") or []:
            _print(f"→ {call['function']['name']}({call['function'].get('arguments', '')})")
    if sample.error is not None:
        _print(f"error: {sample.error}", style="red")
    ended = f", {sample.finish_reason}" if sample.finish_reason else ""
    _print(f"── {sample.prompt_tokens} + {sample.completion_tokens} tokens{ended}, {sample.seconds:.1f} s", style="dim")


def _print_verdicts(shown: "SampleDetails") -> None:
    table = table_of("extractor", "read", "verdict", title=f"gold answer: {shown.sample.gold}", title_justify="left")
    for name, verdict in shown.verdicts.items():
        answer = shown.sample.answers[name]
        mark = "→ " if name == shown.primary else "  "
        table.add_row(f"{mark}{name}", "–" if answer is None else answer, verdict or "–")
    if shown.verdicts:
        out.print(table, markup=False)


def _print_rows(stored: "StoredRows") -> None:
    from serve_app.capture.structure import ranges

    start, stop = stored.rows
    where = "means" if stored.positions and stored.positions[0] < 0 else ranges(stored.positions)
    _print(f"rows of turn {stored.turn}: {stored.rollout_id} in {stored.session}")
    _print(f"  {stored.shard} [{start}:{stop}], positions {where or 'none'}, {stored.dtype.replace('torch.', '')}")
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for key, shape in stored.shapes.items():
        by_shape.setdefault(shape, []).append(key)
    for shape, keys in by_shape.items():
        _print(f"  {list(shape)}: {', '.join(keys)}")


def _format_score(score: "ProbeScore") -> str:
    if score.unread:
        return f"{score.name}: not scored: {score.unread}"
    names = score.classes if len(score.classes) == len(score.scores) else ("",) * len(score.scores)
    values = ", ".join(f"{name} {value:+.3f}".strip() for name, value in zip(names, score.scores, strict=True))
    share = "" if score.probability is None else f", probability {score.probability:.2f}"
    return f"{score.name}: {values} ({score.unit.replace('_', '-')}{share}; fitted on all samples)"
