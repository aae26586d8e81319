"""The Python interface to probes: `roentgen.probes.train` and `stop`, like `roentgen probe train` and `roentgen probe stop`.

The top-level package `probes` does the work.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from probes import ProbeReport
from probes import train as train_probes
from probes.choosing import Fit
from probes.kinds import Kind
from probes.kinds.linear import LinearProbes
from probes.stopping import StopReport
from roentgen.argument_names import naming_arguments
from roentgen.linear_probe import SavedProbe, load_probe, read_cards
from roentgen.pages import page_environment
from roentgen.probes import early_stopping

__all__ = ["Kind", "LinearProbes", "StopReport", "TrainedProbes", "stop", "train"]

stop = naming_arguments()(early_stopping.stop)


@dataclass(frozen=True, eq=False, repr=False)
class TrainedProbes:
    """The result of a training: its report and the saved probes, one for every stored key and position."""

    report: ProbeReport
    """All results with their confidence intervals, and notes on them."""
    folder: Path
    """The folder with the probes, the plots and the page `report.html`."""

    @cached_property
    def probe(self) -> SavedProbe:
        """The probe that most folds selected, for use in `probes=` and `Steer`."""
        return self[Counter(self.report.best.names).most_common(1)[0][0]]

    @property
    def names(self) -> list[str]:
        """Names of the saved probes, such as `layers.12.resid_post@last_prompt`."""
        return list(read_cards(self.folder))

    def __getitem__(self, name: str) -> SavedProbe:
        """Return a saved probe.

        Raises:
            SavedProbeError: if there is no probe of this name; kinds that are not linear save none.
        """
        return load_probe(self.folder, name)

    @property
    def directions(self) -> dict[str, Float[Tensor, "outputs d"]]:
        """The direction of every saved probe, by name: of length 1 in the activations' own units, `[outputs, d]`."""
        return {name: self[name].direction for name in self.names}

    def __repr__(self) -> str:
        best = Counter(self.report.best.names).most_common(1)[0][0]
        return f"TrainedProbes({self.report.label}: {self.report.metric} {self.report.best.estimate} at {best})"

    def _repr_html_(self) -> str:
        template = page_environment("roentgen.pages").get_template("probes.html")
        return template.render(report=self.report, folder=str(self.folder), notes=self.report.notes())


@naming_arguments()
def train(
    sources: Any,
    label: str = "correct",
    positions: str | Sequence[str] = "last_prompt",
    *,
    kind: str | Kind | Fit | None = None,
    declared: str | None = None,
    seed: int = 0,
    session: str | Path | None = None,
    table: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "cpu",
    stage: Callable[[str], None] = lambda text: None,
) -> TrainedProbes:
    """Train a probe for every stored key, and evaluate each on held-out problems.

    Args:
        sources: a run, a run directory, a session, or several of them.
        label: label to predict: correct, truncated, difficulty, steps, a stored label, a table's column (docs/probes.md).
        positions: one or more token positions: last_prompt, last, mean_prompt, mean_generated, before_answer, at:0.5, tokens.
        kind: kind of probe: logistic, mean_difference, lda, contrast, attention, ridge or multinomial; a `Kind` or a function
            `fit(X, y, groups, strengths)` (docs/extending.md), or a reference to one; None for the usual kind for the label.
        declared: a candidate declared in advance, such as layers.12.resid_post@last_prompt.
        seed: random seed of the folds and the bootstrap.
        session: a session that `Model.capture` or `roentgen capture` made from a run's answers, used instead of the run's own
            activations.
        table: labels as a CSV or parquet file, joined on rollout_id or problem_id.
        output: the output folder; optional for a single run.
        device: device to train on, "cpu" or "cuda".
        stage: called with each stage.

    Raises:
        RunError: if a run is damaged, or has no activations.
        ProbeDataError: if the label, the positions or the stored keys are not available.
        OneClassError: if the label has too few samples of a class.
    """
    several = sources if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]
    places: list[Any] = [getattr(one, "path", getattr(one, "uri", one)) for one in several]
    pages: list[Path] = []
    report = train_probes(
        places,
        label,
        [positions] if isinstance(positions, str) else list(positions),
        kind=kind, declared=declared, seed=seed, session=session, table=table, output=output, device=device, stage=stage,
        written=pages.append,
    )  # fmt: skip
    return TrainedProbes(report, pages[0].parent)
