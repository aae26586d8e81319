"""`python -m eval_jobs`: the evaluation against a server that is already there, as under `ray job submit`."""

import typer

from eval_jobs.command import evaluate

typer.run(evaluate)
