"""A run, to be analysed: its samples as a table, its accuracy, and its activations beside them."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from eval_jobs.outputs import write_summary
from eval_jobs.parquet import read_frame
from eval_jobs.report import write_report
from eval_jobs.statistics import Accuracy
from eval_jobs.summary import summarise
from roentgen import runs
from roentgen.pages import page_environment

if TYPE_CHECKING:  # a run's numbers need no torch
    from probes.sources import Source
    from roentgen.store.activations import Activations

SHOWN = 10
"""Samples that a notebook shows."""


class Run:
    """A run directory, as `roentgen eval` and `roentgen.evaluate` leave it."""

    def __init__(self, path: str | Path) -> None:
        """Open a run directory.

        Args:
            path: the folder.

        Raises:
            RunError: if there is no run, or its config.json is damaged.
        """
        self._files = runs.Run.open(path)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._files.path

    @property
    def config(self) -> runs.RunConfig:
        """What was asked for: model, prompt, sampling, problems."""
        return self._files.config

    @cached_property
    def samples(self) -> pd.DataFrame:
        """A row per sample, in the order of their names; the columns are those of `roentgen export RUN x.parquet`.

        `correct` and `verdict` are the primary extractor's; rollout_ids name the sample's rows in the store.
        """
        return read_frame(self._files)

    @cached_property
    def accuracy(self) -> Accuracy:
        """The share of correct samples with its 95% interval (`value`, `low`, `high`), clustered by problem."""
        return Accuracy(**summarise(self.config, self._files.samples())["accuracy"])

    def activations(self, key: str, positions: str = "all", *, session: str | Path | None = None) -> "Activations":
        """Return the stored rows of one key, an item per sample that has any, read when they are looked at.

        `.stack()` makes one tensor of policies that keep one row; `.rollouts` is a table that says, in the same order, which
        rollout and which problem each is of. In a conversation of several turns the first turn's rollout counts.

        Args:
            key: a stored key, such as "layers.12.resid_post".
            positions: all, prompt, generated, last_prompt, last, stride:k, mean_prompt or mean_generated.
            session: a session that was captured of the run's answers, instead of the run's own rows.

        Raises:
            ProbeDataError: if the run has no activations, or they lie in several sessions.
            StoreError: if the session cannot be read.
        """
        source = self._source(session)
        return source.session.activations(key, where=source.rollouts, positions=positions)

    def keys(self, *, session: str | Path | None = None) -> list[str]:
        """Return the stored keys that there are rows of.

        Args:
            session: as for `activations`.
        """
        return self._source(session).session.keys()

    def report(self) -> Path:
        """Write summary.json and report.html again, with probe results if there are any; return the page's path."""
        write_summary(self._files, None)
        return write_report(self._files)

    def _source(self, session: str | Path | None) -> "Source":
        from probes.errors import ProbeDataError
        from probes.sources import open_source

        sources, _ = open_source(self.path, session)
        if len(sources) != 1:
            found = ", ".join(source.session.uri for source in sources)
            raise ProbeDataError(
                f"session: {self.path} has activations in several sessions, {found}; open each by itself"
            )
        return sources[0]

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self._told()})"

    def _told(self) -> str:
        share = self.accuracy
        if share.value is None:
            return "no samples"
        interval = "" if share.low is None or share.high is None else f" [{share.low:.3f}, {share.high:.3f}]"
        return f"{share.n} samples, accuracy {share.value:.3f}{interval}"

    def _repr_html_(self) -> str:
        columns = ["sample_id", "question", "response", "gold", "verdict"]
        rows = self.samples[columns].head(SHOWN).itertuples(index=False, name=None)
        return page_environment("roentgen.pages").get_template("run.html").render(
            path=str(self.path), model=self.config.hashed["model"], accuracy=self._told(), columns=columns,
            rows=list(rows), more=max(0, len(self.samples) - SHOWN),
        )  # fmt: skip
