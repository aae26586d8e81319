"""`roentgen capture` stores activations of existing texts; `roentgen verify-capture` checks captures."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roentgen.cli.console import LOADING, err, expected_errors, out, stages
from roentgen.options import OptionError, options_of, read_options
from roentgen.stages import Stages
from roentgen.workflows.command_settings import CaptureSettings, VerifySettings

if TYPE_CHECKING:
    from serve_app.verification import VerificationReport


@options_of(CaptureSettings)
def capture(**options: Any) -> None:
    """Store a model's activations on existing texts: a run's answers, or the lines of a file.

    Nothing is generated. Run the command again to continue. The exit code is 1 if some texts could not be captured.
    """
    with stages() as stage, expected_errors():
        settings = read_options(CaptureSettings, options)
        if not settings.source.exists():
            raise OptionError(f"{settings.source} is neither a run directory nor a file")
        stage(LOADING)
        from roentgen.workflows.capture_texts import capture as run_capture

        report = run_capture(settings, err, stage)
    for name, reason in report.failures:
        err.print(f"not captured: {name}: {reason}", style="red", highlight=False, markup=False)
    show = partial(out.print, highlight=False, markup=False, soft_wrap=True)
    show(
        f"{report.stored:,} texts captured ({report.tokens:,} tokens in {report.seconds:.1f} s), "
        f"{report.held:,} already captured, {len(report.failures):,} failed"
    )
    show(f"activations: {report.session}")
    show(f"next: roentgen {f'probe train {report.run} --session' if report.run else 'sessions show'} {report.session}")
    if report.failures:
        raise typer.Exit(1)


@options_of(VerifySettings)
def verify(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False, **options: Any
) -> None:
    """Compare captures from a running batch with single-request forward passes, row by row.

    The exit code is 1 if they differ.
    """
    with stages() as stage, expected_errors():
        asked = read_options(VerifySettings, options)
        stage(LOADING)
        report = _verify(asked, stage)
    if as_json:
        print(report.to_json())
    else:
        from serve_app.verification import render

        out.print(render(report))
    if not report.ok:
        raise typer.Exit(1)


def _verify(asked: VerifySettings, stage: Stages) -> "VerificationReport":
    """Check everything that needs only files, then load the model and verify it."""
    from roentgen.serving.preflight import check_device, with_option_names
    from serve_app.capture.structure import CaptureRequestError
    from serve_app.models.description import describe
    from serve_app.models.model_source import locate

    stage(f"finding {asked.model}")
    check_device(asked.device)
    source = locate(asked.model, asked.revision, quantize=asked.quantize)
    try:
        describe(source).check_capture(asked.layers, asked.hook_points or ())
    except CaptureRequestError as error:
        raise OptionError(with_option_names(str(error))) from error
    # These imports take seconds.
    from serve_app.engines.transformers.loaded_model import load
    from serve_app.models.adapters import read_model
    from serve_app.verification import (
        BUILT_IN_PROMPTS,
        read_prompts,
        taps_to_verify,
        verify_capture,
    )

    texts = BUILT_IN_PROMPTS if asked.prompts is None else read_prompts(asked.prompts)
    loaded = load(source, asked.dtype, asked.device, stage)
    taps = taps_to_verify(loaded.structure, asked.layers, asked.hook_points or ())
    stage(f"running {asked.requests} requests in a batch, then each one alone, at {len(taps)} hook points")
    plain = partial(read_model, source, revision=source.commit, dtype=loaded.dtype) if asked.quantize else None
    return verify_capture(loaded, taps=taps, prompts=texts, count=asked.requests, unquantized=plain)
