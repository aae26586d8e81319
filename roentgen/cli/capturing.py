"""`roentgen capture` keeps what a model holds inside while it reads; `roentgen verify-capture` checks captures."""

from functools import partial
from typing import Annotated, Any

import typer

from roentgen.cli.console import err, expected_errors, out, stage_printer
from roentgen.options import options_of, read_options
from roentgen.workflows.settings import CaptureSettings, VerifySettings


@options_of(CaptureSettings)
def capture(**options: Any) -> None:
    """Keep what a model holds inside while it reads existing texts: a run's answers, or a file's lines.

    Nothing is generated. Run it again to continue. Ends with 1 if some texts could not be captured.
    """
    from roentgen.runs import RunError
    from roentgen.store import StoreError
    from roentgen.transcripts import TranscriptError
    from roentgen.workflows.capture import CaptureError, CaptureSettings
    from roentgen.workflows.capture import capture as run_capture

    with expected_errors(CaptureError, RunError, StoreError, TranscriptError):
        report = run_capture(read_options(CaptureSettings, options), err, stage_printer())
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


@options_of(VerifySettings)
def verify(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False, **options: Any
) -> None:
    """Compare captures of a running batch with lone forwards, row by row; exit code 1 if they differ."""
    from roentgen.serving.preflight import PreflightError, check_device
    from serve_app.capture.resolver import ResolutionError
    from serve_app.capture.structure import CaptureRequestError
    from serve_app.engines.transformers.model import load
    from serve_app.models.architecture import UnsupportedModelError
    from serve_app.models.description import describe
    from serve_app.models.errors import ModelNotFoundError
    from serve_app.models.sources import locate
    from serve_app.verification import (
        BUILT_IN_PROMPTS,
        VerificationError,
        read_prompts,
        render,
        taps_to_verify,
        verify_capture,
    )

    stage = stage_printer()
    with expected_errors(CaptureRequestError, ModelNotFoundError, PreflightError, ResolutionError, VerificationError):
        asked = read_options(VerifySettings, options)
        texts = BUILT_IN_PROMPTS if asked.prompts is None else read_prompts(asked.prompts)
        stage(f"finding {asked.model}")
        check_device(asked.device)
        source = locate(asked.model, asked.revision)
        describe(source).check_capture(asked.layers, asked.hook_points or ())
        loaded = load(source, asked.dtype, asked.device, stage)
        taps = taps_to_verify(loaded.structure, asked.layers, asked.hook_points or ())
    stage(f"{asked.requests} requests join and leave a batch, then each runs alone: {len(taps)} hook points")
    with expected_errors(UnsupportedModelError):
        report = verify_capture(loaded, taps=taps, prompts=texts, count=asked.requests)
    if as_json:
        print(report.to_json())
    else:
        out.print(render(report))
    if not report.ok:
        raise typer.Exit(1)
