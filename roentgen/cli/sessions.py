"""`roentgen sessions`: what a store holds, and whether it is still what was written."""

from typing import Annotated

import typer
from rich.table import Table

from roentgen.cli.console import err, expected_errors, out

sessions_app = typer.Typer(no_args_is_help=True, help="Activation sessions of a store.")


@sessions_app.command("list")
def sessions_list(store: Annotated[str, typer.Argument(help="The store's folder.")]) -> None:
    """List the sessions of a store."""
    from roentgen.store import StoreError, list_sessions

    with expected_errors(StoreError):
        summaries = list_sessions(store)
    table = Table("session", "rollouts", "tokens", "shards", "size", "keys", "models")
    for s in summaries:
        size = f"{s.bytes / 1e6:,.1f} MB"
        table.add_row(
            s.session_id, f"{s.rollouts:,}", f"{s.tokens:,}", str(s.shards), size, str(len(s.keys)), ", ".join(s.models)
        )
    out.print(table if summaries else f"no sessions in {store}")


@sessions_app.command("show")
def sessions_show(session: Annotated[str, typer.Argument(help="STORE/SESSION")]) -> None:
    """Show what a session holds: its keys and its rollouts."""
    from roentgen.store import Session, StoreError
    from roentgen.store.sessions import summarise

    with expected_errors(StoreError):
        opened = Session.open(session)
        summary, frame = summarise(opened), opened.rollouts()
    out.print(
        f"[bold]{summary.session_id}[/bold]  {summary.rollouts:,} rollouts, {summary.tokens:,} tokens, "
        f"{summary.shards} shards, {summary.bytes / 1e6:,.1f} MB  ({', '.join(summary.models)})",
        highlight=False,
    )
    out.print("keys: " + ", ".join(summary.keys), highlight=False)
    table = Table("rollout", "problem", "epoch", "turn", "prompt", "completion", "finish", "shard rows")
    for row in frame.head(50).to_dict("records"):
        keyed = isinstance(row["problem_id"], str)
        identity = (row["problem_id"], f"{row['epoch']:.0f}", f"{row['turn']:.0f}") if keyed else ("-", "-", "-")
        counts = (str(row["n_prompt"]), str(row["n_completion"]))
        table.add_row(
            row["rollout_id"], *identity, *counts, row["finish_reason"], f"{row['row_start']}:{row['row_stop']}"
        )
    out.print(table)
    if len(frame) > 50:
        out.print(f"… and {len(frame) - 50:,} more")


@sessions_app.command("verify")
def sessions_verify(session: Annotated[str, typer.Argument(help="STORE/SESSION")]) -> None:
    """Read every rollout back and recompute its checksum; exit code 1 if anything is damaged."""
    from roentgen.store import Session, StoreError, verify

    with expected_errors(StoreError):
        report = verify(Session.open(session))
    for damage in report.damage:
        err.print(f"[red]damaged[/red] {damage.rollout_id or ''} {damage.file}: {damage.what}", highlight=False)
    if report.orphans:
        out.print(f"{len(report.orphans)} orphan shards (left by a crash, invisible to readers)")
    out.print(f"{report.rollouts:,} rollouts verified, {len(report.damage)} damaged")
    if not report.ok:
        raise typer.Exit(1)
