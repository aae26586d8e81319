"""`roentgen sessions`: list, show, verify, copy, compact, export and delete the sessions of a store."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from roentgen import api_keys
from roentgen.cli.console import err, expected_errors, out, table_of

sessions_app = typer.Typer(no_args_is_help=True, help="Manage the activation sessions of a store.")


Address = Annotated[str, typer.Argument(help="STORE/SESSION, where STORE is a folder or s3://BUCKET/FOLDER.")]


@sessions_app.command("list")
def sessions_list(
    store: Annotated[str, typer.Argument(help="Activation store: a folder, or s3://BUCKET/FOLDER.")],
) -> None:
    """List the sessions of a store."""
    from roentgen.store import list_sessions

    with expected_errors():
        summaries = list_sessions(store)
    table = table_of("session", "rollouts", "tokens", "shards", "size", "keys", "models")
    for s in summaries:
        size = f"{s.bytes / 1e6:,.1f} MB"
        table.add_row(
            s.session_id, f"{s.rollouts:,}", f"{s.tokens:,}", str(s.shards), size, str(len(s.keys)), ", ".join(s.models)
        )
    out.print(table if summaries else f"no sessions in {store}")
    for s in summaries:
        if s.damage:
            err.print(f"[red]damaged[/red] {s.session_id}: {escape(s.damage)}", highlight=False)


@sessions_app.command("show")
def sessions_show(session: Address) -> None:
    """Show a session's keys and rollouts."""
    from roentgen.store import Session, StoreError
    from roentgen.store.sessions import summarize_session

    with expected_errors():
        opened = Session.open(session)
        frame, summary = opened.rollouts(columns=("finish_reason",)), summarize_session(opened.folder)
        if summary.damage:
            raise StoreError(summary.damage)
    out.print(
        f"[bold]{summary.session_id}[/bold]  {summary.rollouts:,} rollouts, {summary.tokens:,} tokens, "
        f"{summary.shards} shards, {summary.bytes / 1e6:,.1f} MB  ({', '.join(summary.models)})",
        highlight=False,
    )
    out.print("keys: " + ", ".join(summary.keys), highlight=False)
    table = table_of("rollout", "problem", "epoch", "turn", "prompt", "completion", "finish", "shard rows")
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
def sessions_verify(session: Address) -> None:
    """Read every rollout and recompute its checksum. The exit code is 1 if anything is damaged."""
    from roentgen.store import Session, verify

    with expected_errors():
        report = verify(Session.open(session))
    for damage in report.damage:
        err.print(f"[red]damaged[/red] {damage.rollout_id or ''} {damage.file}: {damage.what}", highlight=False)
    if report.orphans:
        out.print(f"{len(report.orphans)} orphan shards (left by a crash, invisible to readers)")
    out.print(f"{report.rollouts:,} rollouts verified, {len(report.damage)} damaged")
    if not report.ok:
        raise typer.Exit(1)


@sessions_app.command("gc")
def sessions_gc(
    session: Address,
    run: Annotated[
        list[Path] | None,
        typer.Option(
            help="Also remove rollouts of this run's configuration that the run does not reference. Repeatable."
        ),
    ] = None,
    older_than: Annotated[float, typer.Option(help="Keep files younger than this many minutes.")] = 60,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
) -> None:
    """Remove files that no reader uses: orphan shards, partially written files, and files replaced by a merge."""
    from roentgen.workflows.garbage_collection import collect_garbage

    with expected_errors(OSError):
        removed = collect_garbage(session, run or [], older_than_s=older_than * 60, dry_run=dry_run)
    for name in removed.files:
        out.print(name, highlight=False)
    what = f"{removed.dropped:,} rollouts and {len(removed.files):,} files, {removed.size / 1e6:,.1f} MB"
    out.print(f"{'would remove' if dry_run else 'removed'} {what}", highlight=False)


@sessions_app.command("compact")
def sessions_compact(
    session: Address,
    shard_mb: Annotated[int, typer.Option(min=1, help="Approximate size of a merged shard, in MB.")] = 256,
) -> None:
    """Merge small shards into large ones. The session may be read and written meanwhile; `gc` later removes the small ones."""
    from roentgen.store import Session
    from roentgen.store.merging import compact

    with expected_errors(OSError):
        done = compact(Session.open(session), shard_bytes=shard_mb << 20)
    if not done.replaced:
        out.print("nothing to merge")
        return
    out.print(
        f"{done.rollouts:,} rollouts: {done.replaced:,} index files are now {len(done.indexes):,}, "
        f"{len(done.moved):,} shards are now {len(done.into):,}",
        highlight=False,
    )


@sessions_app.command("export")
def sessions_export(
    session: Address,
    output: Annotated[Path, typer.Argument(help="Output folder.")],
    kind: Annotated[
        Literal["pt", "hf"],
        typer.Option("--format", help="pt: one float32 file per rollout and key; hf: one dataset per key."),
    ] = "pt",
    key: Annotated[str, typer.Option(help="hf format: export only this key, such as layers.12.resid_post.")] = "",
    positions: Annotated[str, typer.Option(help="hf format: token positions to export.")] = "all",
) -> None:
    """Export a session to another format."""
    from roentgen.model_names import suggest
    from roentgen.store import Session
    from roentgen.store.exports import all_to_hf, export_pt, to_hf

    with expected_errors(OSError, ValueError):
        opened = Session.open(session)
        if kind == "pt":
            with _bar("rollouts") as on_progress:
                total = len(opened.rollouts(columns=()))
                count = export_pt(opened, output, on_progress=lambda done: on_progress(done, total))
            out.print(f"{count:,} files in {output}", highlight=False)
            return
        stored = opened.keys()
        if key and key not in stored:
            raise ValueError(f"--key: {key!r} is not stored; allowed are {', '.join(stored)}{suggest(key, stored)}")
        if key:
            to_hf(opened, key, positions=positions).save_to_disk(output)
        else:
            all_to_hf(opened, positions=positions).save_to_disk(output)
    which = "" if key else f"[{stored[0]!r}]"
    out.print(f"datasets.load_from_disk({str(output)!r}){which}", highlight=False, soft_wrap=True)


@sessions_app.command("pull")
def sessions_pull(
    source: Annotated[str, typer.Argument(help="STORE/SESSION, or http://SERVER/v1/activations/session/ID.")],
    store: Annotated[str, typer.Argument(help="Store to copy to.")],
    api_key: Annotated[str, typer.Option(envvar=api_keys.VARIABLE, help="API key of the server.")] = "",
) -> None:
    """Copy a session from a bucket or a server. Run the command again to continue an interrupted copy."""
    from roentgen.store import Session, verify
    from roentgen.store.pulling import pull

    with expected_errors(OSError):
        with _bar("bytes") as on_progress:
            uri = pull(source, store, api_key=api_keys.client_key(api_key), on_progress=on_progress)
        report = verify(Session.open(uri))
    out.print(f"{report.rollouts:,} rollouts in {uri}, {len(report.damage)} damaged", highlight=False)
    if not report.ok:
        raise typer.Exit(1)


@sessions_app.command("rm")
def sessions_rm(
    session: Address,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a session. A session that is being written is not deleted."""
    from roentgen.store.sessions import delete_session, summarize_session
    from roentgen.store.storage_backends import open_folder

    with expected_errors(OSError, ValueError):
        summary = summarize_session(open_folder(session))
        store, _, name = summary.uri.rpartition("/")
        rollouts = "damaged" if summary.damage else f"{summary.rollouts:,} rollouts"
        what = f"{summary.uri}: {rollouts}, {summary.bytes / 1e6:,.1f} MB"
        if not yes and not typer.confirm(f"Delete {what}?"):
            raise typer.Exit(1)
        freed = delete_session(store, name)
    out.print(f"deleted; {freed / 1e6:,.1f} MB freed", highlight=False)


@contextmanager
def _bar(unit: Literal["bytes", "rollouts"]) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar in a terminal; yields a function of (done, total) that updates it."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    counter = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    with Progress(BarColumn(), counter, TimeRemainingColumn(), console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
