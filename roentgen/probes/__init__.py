"""Probes, from a script: `roentgen.probes.train` does what the command `roentgen probe train` does.

The work is the top-level package `probes`; here is what a script gets of it.
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
    """What a training found, and its saved probes, one for every stored key and position."""

    report: ProbeReport
    """Every number, with its interval, and the notes that go with them."""
    folder: Path
    """Where it is: the probes, the plots, and the page `report.html`."""

    @cached_property
    def probe(self) -> SavedProbe:
        """The probe that most folds chose. A model reads it (`probes=`) and is steered with it (`Steer`)."""
        return self[Counter(self.report.best.names).most_common(1)[0][0]]

    @property
    def names(self) -> list[str]:
        """What the saved probes are called, such as `layers.12.resid_post@last_prompt`."""
        return list(read_cards(self.folder))

    def __getitem__(self, name: str) -> SavedProbe:
        """Return a saved probe.

        Raises:
            SavedProbeError: naming those that there are; a kind that is not linear leaves none.
        """
        return load_probe(self.folder, name)

    @property
    def directions(self) -> dict[str, Float[Tensor, "outputs d"]]:
        """The direction of every saved probe by name, of length 1 in the activations' own units, `[outputs, d]`."""
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
    """Train a probe for every stored key, and say honestly how well each does on problems it has not seen.

    Args:
        sources: a run, a run directory, a session, or several of them.
        label: what to read: correct, truncated, difficulty, steps, a stored label, a table's column (docs/probes.md).
        positions: where, one or several: last_prompt, last, mean_prompt, mean_generated, before_answer, at:0.5, tokens.
        kind: logistic, mean_difference, lda, contrast, attention, ridge or multinomial; a reference to a `Kind` or to a
            function `fit(X, y, groups, strengths)` (docs/extending.md), or one itself; else the label's usual.
        declared: a candidate named beforehand, layers.12.resid_post@last_prompt.
        seed: of the folds and the bootstrap.
        session: a session that `Model.capture` or `roentgen capture` made of a run's answers, instead of the run's own rows.
        table: labels as CSV or parquet, joined on rollout_id or problem_id.
        output: the folder; for a single run it may be left out.
        device: where to fit, "cpu" or "cuda".
        stage: told what is being done.

    Raises:
        RunError: if a run is damaged, or has no activations.
        ProbeDataError: if something asked for is not there.
        OneClassError: if the label does not vary enough.
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
