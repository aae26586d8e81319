"""`roentgen capture` keeps what a model holds inside while it reads; `roentgen verify-capture` checks captures."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from roentgen.cli.console import err, expected_errors, out, stage_printer
from roentgen.cli.serving import server_config
from roentgen.contract import DEFAULT_HOOK_POINTS, DEFAULT_LAYERS


def capture(
    source: Annotated[Path, typer.Argument(help="A run directory, or a JSON lines file (docs/capture.md).")],
    model: Annotated[str | None, typer.Option(help="The model to read with; the run's own if absent.")] = None,
    layers: Annotated[str, typer.Option(help="Layers to keep, or all.")] = ",".join(map(str, DEFAULT_LAYERS)),
    hook_points: Annotated[str, typer.Option(help="Hook points to keep.")] = ",".join(DEFAULT_HOOK_POINTS),
    positions: Annotated[str, typer.Option(help="Positions to keep.")] = "all",
    allow_non_finite: Annotated[
        bool, typer.Option("--allow-non-finite", help="Keep rows with NaN or infinity; they fail their text otherwise.")
    ] = False,
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

    from eval_jobs.settings import SettingsError, check_settings
    from roentgen.contract import ActivationRequest
    from roentgen.runs import RunError
    from roentgen.store import StoreError
    from roentgen.transcripts import TranscriptError
    from roentgen.workflows.capture import CaptureError, CaptureSettings
    from roentgen.workflows.capture import capture as run_capture

    with expected_errors(CaptureError, RunError, SettingsError, StoreError, TranscriptError, ValidationError):
        asked = check_settings(layers=layers, hook_points=hook_points, positions=positions, collect_activations=True,
                               allow_non_finite=allow_non_finite)  # fmt: skip
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


def verify(
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
    from serve_app.engines.transformers.model import load
    from serve_app.models.architecture import UnsupportedModelError
    from serve_app.models.errors import ModelNotFoundError
    from serve_app.models.sources import locate
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
    with expected_errors(UnsupportedModelError):
        report = verify_capture(loaded, taps=taps, prompts=texts, count=requests)
    if as_json:
        print(report.to_json())
    else:
        out.print(render(report))
    if not report.ok:
        raise typer.Exit(1)
