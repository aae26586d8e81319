"""Exports a run as a Hugging Face dataset: `roentgen export RUN FOLDER --format hf`, and `--push` uploads it.

    FOLDER/README.md                        the dataset card: how it was made, how to load it
    FOLDER/samples/  FOLDER/rollouts/       tables (`dataset_tables`)
    FOLDER/layers.12.resid_post/  …         one per stored key

The folder is created atomically. Only `push` needs a network; it uses huggingface_hub with the token of `hf auth login` or
`HF_TOKEN`.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval_jobs.summary import summarize_samples
from roentgen.atomic_files import atomic_folder, write_text
from roentgen.contract import execution_order
from roentgen.errors import RoentgenError
from roentgen.runs import Run
from roentgen.runs.stored import find_rollouts
from roentgen.workflows.dataset_card import write_card
from roentgen.workflows.dataset_tables import Judged, Table, write_rollouts, write_rows, write_samples


class ExportError(RoentgenError):
    """A run cannot be exported or uploaded; the message says why."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    path: Path
    """The file, or the dataset's folder."""
    tables: tuple[Table, ...]
    """The tables: samples and, in a dataset, rollouts and then one table per stored key."""
    address: str = ""
    """Address of the commit on the Hugging Face Hub, if it was uploaded."""

    @property
    def nbytes(self) -> int:
        """Size of all tables in bytes."""
        return sum(table.nbytes for table in self.tables)


def export_dataset(
    run: Run, folder: Path, session: str | Path | None = None, stage: Callable[[str], None] = lambda _: None
) -> Exported:
    """Write a run as a Hugging Face dataset.

    Args:
        run: the run.
        folder: the output folder, which must not exist or be empty.
        session: a session captured from the run's answers, used instead of the run's own activations.
        stage: called with each stage.

    Raises:
        ExportError: if the folder is not empty.
        RunError: if the record is damaged.
        StoreError: if activations cannot be read.
        OSError: if a file cannot be written; the folder is then not created.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is not empty; choose another folder, or remove it")
    extractor = run.config.settings["extractor"]
    samples = run.read_samples().by_name()
    stage(f"reading {run.path}")
    parts = find_rollouts(run, samples, session)
    judged = {sample.sample_id: Judged.of(sample, extractor) for sample in samples}
    specs = [part.session.spec(str(shard)) for part in parts for shard in part.rollouts["shard"].unique()]
    keys = sorted({key for spec in specs for key in spec.keys}, key=execution_order)
    command = ["roentgen", "export", run.path.name, folder.name, "--format", "hf"]
    command += [] if session is None else ["--session", str(session).rstrip("/").rsplit("/", 1)[-1]]
    with atomic_folder(folder) as temporary:
        stage("writing samples and rollouts")
        tables = [write_samples(run, temporary), write_rollouts(parts, judged, temporary)]
        for number, key in enumerate(keys, start=1):
            stage(f"writing {key} ({number} of {len(keys)})")
            tables.append(write_rows(parts, key, temporary))
        stored = {
            name: ", ".join(dict.fromkeys(str(getattr(spec, name)) for spec in specs))
            for name in ("positions", "dtype")
        }
        card = write_card(
            folder.name,
            run.config,
            summarize_samples(run.config, samples),
            stored if specs else None,
            tables,
            shlex.join(command),
        )
        write_text(temporary / "README.md", card)
    return Exported(folder, tuple(tables))


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload an exported folder to the Hugging Face Hub, with the token that huggingface_hub finds.

    Args:
        folder: the folder that `export_dataset` wrote.
        repository: USER/NAME of the dataset; created if it does not exist.
        public: whether a new repository is public; an existing one is not changed.

    Returns:
        The commit's address.

    Raises:
        ExportError: if the upload fails; the folder is kept.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, repo_type="dataset", commit_message="Export a run of Roentgen"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ExportError(
            f"--push: {repository!r} was not uploaded: {' '.join(str(error).split())}; the dataset is in {folder}; retry with "
            f"`hf upload {repository} {shlex.quote(str(folder))} --repo-type dataset`"
        ) from error
    return str(done.commit_url)
