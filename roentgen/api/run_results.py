"""Functions of a finished run, like the commands of the same names: `report`, `score`, `compare`, `show`, `export`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from eval_jobs.inspect_export import write_inspect_log
from eval_jobs.outputs import write_summary
from eval_jobs.parquet_export import write_parquet
from eval_jobs.report import write_report
from eval_jobs.rescoring import rescore
from eval_jobs.verdicts import Scorer
from roentgen.argument_names import naming_arguments
from roentgen.runs import Run
from roentgen.runs.run_comparison import RunComparison
from roentgen.runs.run_comparison import compare as compare_runs
from roentgen.view.export import write_run
from roentgen.workflows.dataset_export import Exported, ExportError, export_dataset, push
from roentgen.workflows.dataset_tables import Table
from roentgen.workflows.sample_details import SampleDetails, describe, find_sample

Format = Literal["parquet", "eval", "html", "hf"]

SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".eval": "eval", ".html": "html"}
"""Formats by file extension."""


@naming_arguments()
def report(run: Run | str | Path) -> Path:
    """Rewrite a run's summary.json and report.html, with probe results if there are any; return the page's path.

    Args:
        run: the run, or its folder.

    Raises:
        RunError: if the run does not exist or is damaged.
        OSError: if a file cannot be written.
    """
    opened = _opened(run)
    write_summary(opened, None)
    return write_report(opened)


@naming_arguments()
def score(run: Run | str | Path, extractor: str | Scorer | None = None) -> Run:
    """Score a run's answers again, without the model, and rewrite its summary and report.

    Args:
        run: the run, or its folder.
        extractor: the new primary extractor: a name, a reference, or a function `(output, problem)`; None for the run's own.

    Raises:
        EvalError: if the extractor does not exist, or returns something other than a verdict; the run is unchanged.
        RunError: if an evaluation is writing the run, or it is damaged.
    """
    return rescore(_opened(run), extractor)


@naming_arguments()
def compare(first: Run | str | Path, second: Run | str | Path) -> RunComparison:
    """Compare two runs problem by problem: the difference in accuracy with its confidence interval, and McNemar's test.

    Args:
        first: a run, or its folder.
        second: another run, which shares problems with the first.

    Raises:
        RunError: if the run does not exist or is damaged.
    """
    return compare_runs(_opened(first), _opened(second))


@naming_arguments()
def show(
    run: Run | str | Path, sample: str | int, *, epoch: int | None = None, variant: str | None = None
) -> SampleDetails:
    """Return the details of one sample: prompt, answer, verdicts, the location of its activations, and its probe scores.

    Args:
        run: the run, or its folder.
        sample: sample number, sample id or problem id: 7, "gsm8k_0007".
        epoch: the epoch (attempt); None for the first.
        variant: the variant; None for the first.

    Raises:
        RunError: if the run or the sample does not exist, or the record is damaged.
        SavedProbeError: if the run's probes are damaged.
    """
    opened = _opened(run)
    found = find_sample(opened, sample, epoch=epoch, variant=variant)
    return describe(opened, found.sample, found.others)


@naming_arguments(push="push_to")
def export(
    run: Run | str | Path,
    output: str | Path,
    format: Format | None = None,
    *,
    session: str | None = None,
    push_to: str | None = None,
    public: bool = False,
    stage: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Export a run as a table of samples, as a log for `inspect view`, as a page, or as a dataset with its activations.

    Args:
        run: the run, or its folder.
        output: SAMPLES.parquet, LOG.eval for inspect_ai, PAGE.html for a browser, or a folder for a Hugging Face dataset.
        format: "parquet", "eval", "html" or "hf"; by default determined by the extension of `output`.
        session: for "hf": a session captured from the run's answers; None for the run's own activations.
        push_to: for "hf": also upload to the Hugging Face Hub as USER/NAME.
        public: make the uploaded dataset public.
        stage: called with each stage.

    Raises:
        ExportError: if the format is unknown, an option belongs to another format, the folder is not empty, or the hub refuses.
        RunError: if the run does not exist or is damaged.
        StoreError: if activations cannot be read.
        OSError: if a file cannot be written.
    """
    path = Path(output)
    kind = format or ("hf" if push_to else SUFFIXES.get(path.suffix))
    if kind is None:
        raise ExportError(
            f"output: {path.name!r} has no known extension; allowed are {', '.join(SUFFIXES)}, and format hf for a folder"
        )
    given = {"session": session is not None, "push": push_to is not None, "public": public}
    if kind != "hf" and (wrong := [name for name, there in given.items() if there]):
        raise ExportError(f"{wrong[0]}: allowed only with format hf; the format is {kind}")
    opened = _opened(run)
    if kind == "hf":
        done = export_dataset(opened, path, session, stage)
        if push_to is None:
            return done
        stage(f"sending it to {push_to}")
        return replace(done, address=push(path, push_to, public=public))
    path.parent.mkdir(parents=True, exist_ok=True)
    count = {"parquet": write_parquet, "eval": write_inspect_log, "html": write_run}[kind](opened, path)
    return Exported(path, (Table("samples", count, path.stat().st_size),))


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run(run)
