"""Reads a run directory: its samples as a table and one by one, its accuracy, and its activations.

Reading needs neither a lock nor a server, even while an evaluation is writing (`writing`). The record is parsed one sample
at a time (`Run.read_samples`). The table, the accuracy and the activations are derived from it, and import pandas, SciPy
and torch only when they are used.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from roentgen.runs.config import RunConfig
from roentgen.runs.questions import Posed, same_template
from roentgen.runs.record import RunError, Samples, is_being_recorded, read_samples
from roentgen.runs.sample import RolloutRef

if TYPE_CHECKING:
    import pandas as pd

    from roentgen.runs.stored import StoredSamples
    from roentgen.statistics import Accuracy
    from roentgen.store import Activations

SHOWN = 10
"""Number of samples shown in a notebook."""


class Run:
    """A run directory, as `roentgen eval` and `roentgen.evaluate` leave it."""

    def __init__(self, path: str | Path, config: RunConfig | None = None) -> None:
        """Open a run directory.

        Args:
            path: the folder.
            config: the configuration, if config.json has not been written yet; otherwise the file is read.

        Raises:
            RunError: if the folder is not a run, or its config.json is damaged.
        """
        self._path = Path(path).expanduser().absolute()
        self._config = _read_config(self._path) if config is None else config

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def config(self) -> RunConfig:
        """The configuration: model, prompt, sampling, problems."""
        return self._config

    @cached_property
    def samples(self) -> "pd.DataFrame":
        """One row per sample, sorted by name; the columns are those of `roentgen export RUN x.parquet`.

        `correct` and `verdict` are the primary extractor's; rollout_ids identify the sample's rows in the store. The table
        is made
        once; open the run again to see newer samples.
        """
        from roentgen.runs.table import frame_of

        return frame_of(self.read_samples().by_name(), self.config.extractor, self.session_uri)

    @cached_property
    def accuracy(self) -> "Accuracy":
        """The share of correct samples with its 95% interval (`value`, `low`, `high`), clustered by problem.

        Like `samples`, it is computed on first access.
        """
        from roentgen.statistics import accuracy

        judged: list[tuple[str, bool]] = []
        posed: dict[str, Posed] = {}
        for sample in self.read_samples():
            if sample.error is not None:
                continue
            posed.setdefault(sample.problem_id, sample.posed.brief())
            if self.config.extractor in sample.correct_by:
                judged.append((sample.problem_id, sample.correct_by[self.config.extractor]))
        clusters = dict(zip(posed, same_template(list(posed.values())), strict=True))
        return accuracy([verdict for _, verdict in judged], [clusters[problem] for problem, _ in judged])

    def activations(self, key: str, positions: str = "all", *, session: str | Path | None = None) -> "Activations":
        """Return a lazy sequence of one key's stored rows, one item per sample that has any.

        The items are in the order of `samples`: if every sample has rows, item i belongs to `samples.iloc[i]`.

        For policies that keep one row, `.stack()` returns one tensor; `.rollouts` is a table with the rollout and problem
        of each
        item, in the same order. In a conversation of several turns, the first turn's rollout is used.

        Args:
            key: a stored key, such as "layers.12.resid_post".
            positions: all, prompt, generated, last_prompt, last, stride:k, mean_prompt or mean_generated.
            session: a session captured from the run's answers, instead of the run's own rows.

        Raises:
            RunError: if the run has no activations, or they are in several sessions.
            StoreError: if the session cannot be read.
        """
        part = self._one_session(session)
        return part.session.activations(key, where=part.rollouts, positions=positions)

    def keys(self, *, session: str | Path | None = None) -> list[str]:
        """Return the stored keys of the run's activations.

        Args:
            session: as for `activations`.

        Raises:
            RunError: if the run has no activations, or they are in several sessions.
            StoreError: if the session cannot be read.
        """
        return self._one_session(session).session.keys()

    def stored(self, *, session: str | Path | None = None) -> "list[StoredSamples]":
        """Return the finished samples with stored activations, each with its row of the store's index.

        There is one part per session, in the order of `samples`. In a conversation of several turns, the first turn's
        rollout is
        used: there the model has seen only the problem.

        Args:
            session: a session captured from the run's answers, instead of the run's own rows.

        Raises:
            RunError: if no sample has activations, or the store lacks some.
            StoreError: if a session cannot be read.
        """
        from roentgen.runs.stored import StoredSamples, find_rollouts

        recorded = self.read_samples().by_name()
        answered = {sample.sample_id: sample for sample in recorded if sample.error is None}
        parts = [
            StoredSamples(part.session, part.rollouts, tuple(answered[name] for name in part.sample_ids))
            for part in find_rollouts(self, answered.values(), session, first_turns=True, columns=None)
        ]
        if not parts:
            lacking = (
                f"{self.path} has no activations: none of its {len(recorded)} samples names a rollout; "
                "evaluate again with --collect-activations"
            )
            if session is not None:
                lacking = (
                    f"{session} holds none of the {len(recorded)} samples of {self.path}: none of its rollouts has the key of "
                    f"one; `roentgen capture {self.path}` creates a session that does"
                )
            raise RunError(lacking)
        return parts

    def read_samples(self) -> Samples:
        """Read the record: each sample once, with its first answer or, without one, its last error.

        Samples are parsed one at a time on each access. A torn last line (from a crash during the write) is
        skipped.

        Raises:
            RunError: if any other line is not a sample; the message names the line. A line is fully validated when it is read.
        """
        return read_samples(self.record_path, self.config.config_hashes)

    def summary(self) -> dict[str, Any] | None:
        """Return the contents of summary.json; None if it has not been written yet.

        Raises:
            RunError: if it is damaged; it can be regenerated.
        """
        file = self.path / "summary.json"
        try:
            summary: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error}); `roentgen report {self.path}` writes it again") from error
        return summary

    @property
    def record_path(self) -> Path:
        """The append-only record, one line of JSON per sample."""
        return self.path / "samples.jsonl"

    @property
    def is_running(self) -> bool:
        """True if an evaluation is recording into it."""
        return is_being_recorded(self.record_path)

    def session_uri(self, ref: RolloutRef) -> str:
        """Return the address of a rollout's session: as recorded or, if that folder no longer exists, inside the run, which
        may have been moved."""
        inside = self.path / "activations" / ref.session_id
        return str(inside) if inside.is_dir() and not Path(ref.uri).is_dir() else ref.uri

    def probe_folders(self) -> list[Path]:
        """Return the folders of probe results, sorted by label."""
        return sorted(path.parent for path in (self.path / "probes").glob("*/results.json"))

    def _one_session(self, session: str | Path | None) -> "StoredSamples":
        parts = self.stored(session=session)
        if len(parts) != 1:
            found = ", ".join(part.session.uri for part in parts)
            raise RunError(f"session: {self.path} has activations in several sessions, {found}; open one of them")
        return parts[0]

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self._told()})"

    def _told(self) -> str:
        share = self.accuracy
        if share.value is None:
            return "no samples"
        interval = "" if share.low is None or share.high is None else f" [{share.low:.3f}, {share.high:.3f}]"
        return f"{share.n} samples, accuracy {share.value:.3f}{interval}"

    def _repr_html_(self) -> str:
        from roentgen.pages import page_environment

        columns = ["sample_id", "question", "response", "gold", "verdict"]
        rows = self.samples[columns].head(SHOWN).itertuples(index=False, name=None)
        return page_environment("roentgen.pages").get_template("run.html").render(
            path=str(self.path), model=self.config.hashed["model"], accuracy=self._told(), columns=columns,
            rows=list(rows), more=max(0, len(self.samples) - SHOWN),
        )  # fmt: skip


def _read_config(folder: Path) -> RunConfig:
    try:
        return RunConfig.model_validate_json((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise RunError(f"{folder} is not a run directory: it has no config.json") from None
    except ValidationError as error:
        raise RunError(f"{folder / 'config.json'} is damaged: {error}") from error


def find_unfinished(results: Path, config_hash: str, problems: dict[str, Any]) -> Run | None:
    """Return the newest incomplete run under `results` of this configuration and these problems.

    Other folders, such as those of models, are skipped.
    """
    candidates = []
    for file in results.glob("*/config.json"):
        try:
            run = Run(file.parent)
        except RunError:
            continue
        summary = run.summary()
        if (
            run.config.config_hash == config_hash
            and {**run.config.problems, "name": None} == {**problems, "name": None}
            and not (summary or {}).get("complete")
        ):
            candidates.append(run)
    return max(candidates, key=lambda run: run.config.created, default=None)
