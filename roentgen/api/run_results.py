"""What is made of a finished run, as the commands of these names do: its page, its scores anew, a comparison, an export."""

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
from roentgen.workflows.dataset_export import Exported, ExportError, export_dataset, push
from roentgen.workflows.dataset_tables import Table
from roentgen.workflows.sample_details import SampleDetails, describe, find_sample

Format = Literal["parquet", "eval", "hf"]

SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".eval": "eval"}
"""Formats that a file's name tells."""


@naming_arguments()
def report(run: Run | str | Path) -> Path:
    """Write a run's summary.json and report.html again, with probe results if there are any; return the page's path.

    Args:
        run: the run, or its folder.

    Raises:
        RunError: if there is no run, or it is damaged.
        OSError: as the disk answers.
    """
    opened = _opened(run)
    write_summary(opened, None)
    return write_report(opened)


@naming_arguments()
def score(run: Run | str | Path, extractor: str | Scorer | None = None) -> Run:
    """Judge a run's answers again, without the model; what is made of them is written again too.

    Args:
        run: the run, or its folder.
        extractor: the primary one from now on: a name, a reference, or a function `(output, problem)`; the run's own if absent.

    Raises:
        EvalError: if there is no such extractor, or it returns what is no verdict; the run is as it was.
        RunError: if an evaluation is writing the run, or it is damaged.
    """
    return rescore(_opened(run), extractor)


@naming_arguments()
def compare(first: Run | str | Path, second: Run | str | Path) -> RunComparison:
    """Compare two runs, problem by problem: the difference of their accuracies with its interval, and McNemar's test.

    Args:
        first: a run, or its folder.
        second: another one, on some of the same problems.

    Raises:
        RunError: if there is no run, or it is damaged.
    """
    return compare_runs(_opened(first), _opened(second))


@naming_arguments()
def show(
    run: Run | str | Path, sample: str | int, *, epoch: int | None = None, variant: str | None = None
) -> SampleDetails:
    """Return all that is known of one sample: prompt, answer, every verdict, where its rows are, and its probe scores.

    Args:
        run: the run, or its folder.
        sample: 7, "gsm8k_0007", or a problem's id.
        epoch: which attempt; the first if absent.
        variant: under which of the run's prefixes; the first if absent.

    Raises:
        RunError: if there is no such run or sample, or the record is damaged.
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
    """Write a run as a table of its samples, as a log that `inspect view` opens, or with its activations as a data set.

    Args:
        run: the run, or its folder.
        output: SAMPLES.parquet, LOG.eval for inspect_ai, or a folder for a Hugging Face data set.
        format: "parquet", "eval" or "hf"; by default, what `output` ends in.
        session: for "hf": a session that was captured of the run's answers; else its own rows.
        push_to: for "hf": send it to the Hugging Face hub, too, as this USER/NAME.
        public: let everybody see what `push_to` makes.
        stage: told what is being done.

    Raises:
        ExportError: if the format is not told, an option is of another one, the folder holds something, or the hub refuses.
        RunError: if there is no run, or it is damaged.
        StoreError: if activations cannot be read.
        OSError: as the disk answers.
    """
    path = Path(output)
    kind = format or ("hf" if push_to else SUFFIXES.get(path.suffix))
    if kind is None:
        raise ExportError(
            f"output: {path.name!r} says no format; allowed are names ending in {' and '.join(SUFFIXES)}, and the format hf "
            "for a folder"
        )
    given = {"session": session is not None, "push": push_to is not None, "public": public}
    if kind != "hf" and (wrong := [name for name, there in given.items() if there]):
        raise ExportError(f"{wrong[0]}: only the format hf has it, and this is {kind}")
    opened = _opened(run)
    if kind == "hf":
        done = export_dataset(opened, path, session, stage)
        if push_to is None:
            return done
        stage(f"sending it to {push_to}")
        return replace(done, address=push(path, push_to, public=public))
    path.parent.mkdir(parents=True, exist_ok=True)
    count = {"parquet": write_parquet, "eval": write_inspect_log}[kind](opened, path)
    return Exported(path, (Table("samples", count, path.stat().st_size),))


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run(run)
