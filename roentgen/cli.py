"""The `roentgen` command: each verb calls one function of a room and prints what it returns.

Rooms are imported inside the verbs, so that `roentgen --help` does not wait for torch. Expected errors end as one line on
stderr and exit code 2; anything else is a bug and shows its traceback.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from eval_jobs.command import evaluate
from roentgen.contract import DEFAULT_HOOK_POINTS, DEFAULT_LAYERS, LAYER_HOOK_POINTS, MODEL_HOOK_POINTS

if TYPE_CHECKING:
    from eval_jobs.config import EvalSettings
    from serve_app.capture.structure import ModelStructure
    from serve_app.config import ServerConfig

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split("\n")[0]
)
sessions_app = typer.Typer(no_args_is_help=True, help="Activation sessions of a store.")
probe_app = typer.Typer(no_args_is_help=True, help="Probes on stored activations.")
app.add_typer(sessions_app, name="sessions")
app.add_typer(probe_app, name="probe")

out = Console()
err = Console(stderr=True, soft_wrap=True)


@contextmanager
def expected_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors a user can cause into one line and exit code 2."""
    try:
        yield
    except kinds as error:
        err.print(f"error: {describe(error)}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from error


def stage_printer() -> Callable[[str], None]:
    """Return a function that prints what is being done, with the seconds since the start."""
    start = time.monotonic()
    return lambda text: err.print(f"[dim]{time.monotonic() - start:6.1f} s[/dim] {text}", highlight=False)


@app.callback()
def main(context: typer.Context) -> None:
    """Evaluate a language model on GSM8K and keep what it held inside."""
    # `eval` without --base-url starts a server; it gets the means here, because eval_jobs may not import serve_app.
    context.obj = serve_for_eval


app.command(name="eval")(evaluate)


@contextmanager
def serve_for_eval(settings: "EvalSettings") -> Iterator[str]:
    """Start Ray and the server for an evaluation that was given none; yields its base URL."""
    from pydantic import ValidationError

    from eval_jobs import EvalError
    from roentgen.cluster import ClusterError
    from roentgen.launch.local import LaunchError, serving
    from roentgen.store import StoreError

    try:
        given = settings.model_dump(include={"model", "revision", "dtype", "device", "store"}, exclude_none=True)
        config = server_config(**given)
        running = serving(
            config, ray_address=settings.ray_address or "local", stage=stage_printer(), verbose=settings.verbose
        )
        with running as base_url:
            yield base_url
    except (ClusterError, LaunchError, StoreError, ValidationError) as error:
        raise EvalError(describe(error)) from error


def server_config(**options: object) -> "ServerConfig":
    """Validate the server's options."""
    from serve_app.config import ServerConfig

    return ServerConfig.model_validate(options)


def describe(error: Exception) -> str:
    """Say an error in one line; of a validation error, each option, what was given and what is allowed."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']} (given: {e['input']!r})" for e in error.errors()
    )


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="smollm2-135m (embedded), a folder, or a hub id.")] = "smollm2-135m",
    port: Annotated[int, typer.Option(help="0 chooses a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Anything but loopback needs ROENTGEN_API_KEY.")] = "127.0.0.1",
    store: Annotated[Path, typer.Option(help="Folder of the activation store.")] = Path("activations"),
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model: auto, balanced, sequential, or JSON {module: device}.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Requests generated together.")] = 32,
    max_queue: Annotated[int, typer.Option(help="Requests waiting for that; beyond, 429.")] = 256,
    request_timeout: Annotated[float, typer.Option(help="Seconds that a request may take; beyond, 408.")] = 3600,
    num_replicas: Annotated[int, typer.Option(help="Copies of the model.")] = 1,
    allow_model: Annotated[
        list[str] | None, typer.Option(help="A model that clients may load in its place; may be repeated.")
    ] = None,
    ray_address: Annotated[str, typer.Option(help="'local' starts a Ray here; HOST:PORT joins one.")] = "local",
    verbose: Annotated[bool, typer.Option(help="Show Ray's and the replicas' logs.")] = False,
) -> None:
    """Serve a model behind the OpenAI route until interrupted."""
    from pydantic import ValidationError

    from roentgen.cluster import ClusterError, check_address
    from roentgen.launch.local import LaunchError, serving
    from roentgen.store import StoreError

    with expected_errors(ClusterError, LaunchError, StoreError, ValidationError, ValueError):
        check_address(ray_address)
        config = server_config(
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            store=str(store),
            max_batch=max_batch,
            max_queue=max_queue,
            request_timeout_s=request_timeout,
            num_replicas=num_replicas,
            allowed_models=tuple(allow_model or ()),
        )
        running = serving(config, host=host, port=port, ray_address=ray_address, stage=stage_printer(), verbose=verbose)
        with running as base_url:
            out.print(
                f"serving [bold]{model}[/bold] at [bold]{base_url}[/bold]  activations in {config.store}",
                highlight=False,
            )
            out.print("Ctrl-C stops it", highlight=False)
            wait_for_interrupt()


def wait_for_interrupt() -> None:
    """Return when the process is asked to stop, by Ctrl-C or by SIGTERM."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        return


@app.command()
def capture(
    source: Annotated[Path, typer.Argument(help="A run directory, or a JSON lines file (docs/capture.md).")],
    model: Annotated[str | None, typer.Option(help="The model to read with; the run's own if absent.")] = None,
    layers: Annotated[str, typer.Option(help="Layers to keep, or all.")] = ",".join(map(str, DEFAULT_LAYERS)),
    hook_points: Annotated[str, typer.Option(help="Hook points to keep.")] = ",".join(DEFAULT_HOOK_POINTS),
    positions: Annotated[str, typer.Option(help="Positions to keep.")] = "all",
    store: Annotated[str | None, typer.Option(help="Folder of the activation store; the run's if absent.")] = None,
    session: Annotated[str | None, typer.Option(help="Session to store in; made up if absent.")] = None,
    batch: Annotated[int, typer.Option(help="Texts in one forward.")] = 32,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in one forward; 0 for what suits the device.")] = 0,
    chunk_size: Annotated[int | None, typer.Option(help="Layers kept per pass, to need less memory.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16; the run's if absent.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Keep what a model holds inside while it reads existing texts: a run's answers, or a file's lines.

    Nothing is generated. Run it again to continue. Ends with 1 if some texts could not be captured.
    """
    from pydantic import ValidationError

    from eval_jobs.config import SettingsError, check_settings
    from roentgen.contract import ActivationRequest
    from roentgen.launch.capture import CaptureError, CaptureSettings
    from roentgen.launch.capture import capture as run_capture
    from roentgen.runs import RunError
    from roentgen.store import StoreError
    from roentgen.transcripts import TranscriptError

    with expected_errors(CaptureError, RunError, SettingsError, StoreError, TranscriptError, ValidationError):
        asked = check_settings(layers=layers, hook_points=hook_points, positions=positions, collect_activations=True)
        settings = CaptureSettings(
            source=source, model=model, revision=revision, dtype=dtype, device=device, store=store, session=session,
            request=ActivationRequest.model_validate(asked.capture),
            batch=batch, batch_tokens=batch_tokens, chunk_size=chunk_size,
        )  # fmt: skip
        report = run_capture(settings, err, stage_printer())
    for name, reason in report.failures:
        err.print(f"not captured: {name}: {reason}", style="red", highlight=False, markup=False)
    say = partial(out.print, highlight=False, markup=False, soft_wrap=True)
    say(
        f"{report.stored:,} texts captured ({report.tokens:,} tokens in {report.seconds:.1f} s), "
        f"{report.held:,} there already, {len(report.failures):,} failed"
    )
    say(f"activations: {report.session}")
    say(f"next: roentgen {f'probe train {report.run} --session' if report.run else 'sessions show'} {report.session}")
    if report.failures:
        raise typer.Exit(1)


@app.command(name="verify-capture")
def verify_capture_command(
    model: Annotated[str, typer.Argument(help="smollm2-135m (embedded), a folder, or a hub id.")],
    layers: Annotated[str, typer.Option(help="Layers to verify, such as 0,12,-1, or all.")] = "all",
    hook_points: Annotated[str, typer.Option(help="Hook points to verify; by default all that the model has.")] = "",
    requests: Annotated[int, typer.Option(min=2, help="Requests to run.")] = 16,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line, or .jsonl with prompt or question.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Compare captures of a running batch with lone forwards, row by row; exit code 1 if they differ."""
    from pydantic import ValidationError

    from serve_app.capture.resolver import ResolutionError
    from serve_app.capture.structure import CaptureRequestError
    from serve_app.models import load
    from serve_app.sources import ModelNotFoundError, locate
    from serve_app.verification import (
        BUILT_IN_PROMPTS,
        VerificationError,
        read_layers,
        read_prompts,
        render,
        taps_to_verify,
        verify_capture,
    )

    stage = stage_printer()
    with expected_errors(CaptureRequestError, ModelNotFoundError, VerificationError, ResolutionError, ValidationError):
        config = server_config(model=model, revision=revision, dtype=dtype, device=device)
        chosen = read_layers(layers)
        texts = BUILT_IN_PROMPTS if prompts is None else read_prompts(prompts)
        loaded = load(locate(config.model, config.revision), config.dtype, config.device, stage)
        taps = taps_to_verify(loaded.structure, chosen, tuple(filter(None, hook_points.split(","))))
    stage(f"{requests} requests join and leave a batch, then each runs alone: {len(taps)} hook points")
    report = verify_capture(loaded, taps=taps, prompts=texts, count=requests)
    if as_json:
        print(report.to_json())
    else:
        out.print(render(report))
    if not report.ok:
        raise typer.Exit(1)


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


@probe_app.command("train")
def probe_train(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    label: Annotated[str, typer.Option(help="What to predict.")] = "correct",
    positions: Annotated[str, typer.Option(help="last_prompt, last, mean_prompt or mean_generated.")] = "last_prompt",
    seed: Annotated[int, typer.Option(help="Of the folds and the bootstrap.")] = 0,
    session: Annotated[
        str | None, typer.Option(help="STORE/SESSION of `roentgen capture`, instead of the run's own activations.")
    ] = None,
) -> None:
    """Train probes per layer and hook point; exit code 3 if the label has one class only."""
    from probes import OneClassError, ProbeDataError, render, train
    from roentgen.runs import RunError
    from roentgen.store import StoreError

    try:
        with expected_errors(ProbeDataError, RunError, StoreError):
            report = train(run, label=label, positions=positions, seed=seed, session=session)
    except OneClassError as error:
        err.print(f"[yellow]no probe:[/yellow] {error}", highlight=False)
        raise typer.Exit(3) from error
    out.print(render(report))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html again (with probe results, if there are any) and print its path."""
    from eval_jobs.report import write_report
    from roentgen.runs import Run, RunError

    with expected_errors(RunError):
        out.print(str(write_report(Run.open(run))), highlight=False, soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="smollm2-135m (embedded), a folder, or a hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")] = False,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Leave the weights alone: verify on a narrow random model.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
) -> None:
    """Show what a model has to capture: where each hook point is, or why it is missing."""
    from serve_app.capture.resolver import ResolutionError
    from serve_app.inspection import inspect_model
    from serve_app.sources import ModelNotFoundError

    with expected_errors(ModelNotFoundError, ResolutionError):
        structure = inspect_model(model, revision=revision, config_only=config_only)
    if as_json:
        out.print_json(data=structure.record())
        return
    s = structure
    out.print(
        f"[bold]{s.model_name}[/bold]  {s.architecture} ({s.model_type}), {s.num_layers} layers of width {s.d_model:,} at "
        f"{s.layers_path}; verified on {s.verified_on}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(hook_point_table(structure))


def hook_point_table(structure: "ModelStructure") -> Table:
    """Lay out a model's hook points: the module, the side of it, and the layers; of a missing one, why."""
    from serve_app.capture.structure import ranges

    table = Table("hook point", "module", "side", "layers")
    for name in LAYER_HOOK_POINTS:
        for place, layers in structure.places(name).items():
            module, _, side = place.rpartition(".")
            table.add_row(name, module, side, "all" if len(layers) == structure.num_layers else ranges(layers))
        for reason, layers in structure.absences(name).items():
            everywhere = len(layers) == structure.num_layers
            table.add_row(name, f"[dim]missing: {reason}[/dim]", "", "" if everywhere else ranges(layers))
    for name in MODEL_HOOK_POINTS:
        tap = structure.taps.get(name)
        if tap is not None:
            table.add_row(name, tap.module, tap.side, "")
        else:
            table.add_row(name, f"[dim]missing: {structure.missing[name]}[/dim]", "", "")
    return table
