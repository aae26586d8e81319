"""`roentgen join`: store an evaluation harness's scores as labels of the rollouts it caused."""

from typing import Annotated

import typer

from roentgen import api_keys
from roentgen.cli.console import err, expected_errors, out

_SHOWN = 5


def join(
    log: Annotated[
        str,
        typer.Argument(
            help="A log of inspect_ai (.eval, .json) or lm-eval (samples_….jsonl of --log_samples), or a folder of logs."
        ),
    ],
    session: Annotated[str, typer.Argument(help="STORE/SESSION, or http://SERVER/v1/activations/session/ID.")],
    scorer: Annotated[
        list[str] | None, typer.Option(help="Use only this scorer or metric. Repeatable; default: all.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Prefix of the labels' names.")] = "",
    api_key: Annotated[str, typer.Option(envvar=api_keys.VARIABLE, help="API key of the server.")] = "",
) -> None:
    """Store a harness's scores as labels of stored rollouts; a second call changes nothing.

    The exit code is 1 if no sample matches.
    """
    from roentgen.harnesses.join import join as join_log

    with expected_errors(OSError, ValueError):
        key = api_keys.client_key(api_key)
        report = join_log(log, session, scorers=scorer or [], prefix=prefix, api_key=key)
    for reason, names in report.unmatched.items():
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
        err.print(f"not matched, {reason}: {shown}", highlight=False, markup=False)
    out.print(
        f"{report.matched:,} of {report.samples:,} samples matched; {report.rollouts:,} rollouts have their scores as labels, "
        f"new in {report.changed:,}: {', '.join(report.labels) or 'no labels'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if not report.matched:
        raise typer.Exit(1)
