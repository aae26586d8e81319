"""Trains a probe for every candidate and writes the results.

    RUN/probes/<label>/
      probes.safetensors  probes.json       the probes, fitted on all samples (`roentgen.linear_probe`)
      auroc_by_layer.png  heatmap.png  reliability.png  along_trace.png  scores.png  projection.png     those that apply
      dark/                                 the same pictures for a dark background
      report.html                           everything on one page, with transcripts colored by score (`page`)
      results.json                          the report (`ProbeReport.to_json`), written last: if it exists, everything does

Probes on a session made by `roentgen capture` from the run's answers are in `RUN/probes/<label>@<session>/`. A kind other
than the label's default is also part of the name (`<label>+lda`).

`fitting` does the computation.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from probes import plots
from probes.candidate_detail import CandidateDetail, score_candidate
from probes.choosing import Fit, choose_kind
from probes.curves import curves_of
from probes.dataset import ProbeDataset
from probes.errors import ProbeDataError
from probes.fitting import Trained, check_seed, fit_and_evaluate
from probes.folds import nested_folds
from probes.kinds import DEFAULT_KINDS, Kind
from probes.page import render_page
from probes.report import ProbeReport
from probes.sources import SourcePath
from probes.styles import darken
from roentgen.atomic_files import atomic_write, make_folder, write_json, write_text
from roentgen.linear_probe import save_probes


def train(
    sources: SourcePath | Sequence[SourcePath],
    label: str = "correct",
    positions: str | Sequence[str] = ("last_prompt",),
    *,
    kind: str | Kind | Fit | None = None,
    declared: str | None = None,
    seed: int = 0,
    session: SourcePath | None = None,
    table: SourcePath | None = None,
    output: SourcePath | None = None,
    device: str = "cpu",
    stage: Callable[[str], None] = lambda text: None,
    written: Callable[[Path], None] = lambda page: None,
) -> ProbeReport:
    """Train and evaluate a probe per candidate, and write the folder.

    Args:
        sources: run directories, sessions, or a single one.
        label: the label, see `labels`.
        positions: the positions to read, see `positions`.
        kind: the kind of probe: a name, a reference, or an object; the label's default if None.
        declared: a candidate chosen beforehand (`layers.12.resid_post@last_prompt`), reported in addition to the best.
        seed: seed of folds, bootstrap, shuffles and random directions; the same seed gives the same report.
        session: a session with other activations of the runs' answers, instead of their own.
        table: a CSV or parquet file with labels.
        output: the output folder; optional for a single run.
        device: the device for fitting, "cpu" or "cuda".
        stage: called with each stage's description.
        written: called with the path of the page.

    Raises:
        RunError: if a run is damaged.
        ProbeDataError: if requested data does not exist.
        OneClassError: if the label does not vary enough.
    """
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ProbeDataError(f"device: {device!r} is not available; allowed are cpu, and cuda if there is a GPU")
    check_seed(seed)
    stage("reading the activations' index")
    data = ProbeDataset.open(sources, label, session=session, table=table)
    places = [positions] if isinstance(positions, str) else list(positions)
    chosen = choose_kind(data.target, kind)
    usual = chosen.name == DEFAULT_KINDS[data.target.kind]
    if output is None:
        if len(data.names) > 1 or data.examples[0].config is None:
            raise ProbeDataError("output: probes of several sources, or of a session alone, need an output folder")
        run = Path(str(sources if isinstance(sources, str | Path) else sources[0])).expanduser().absolute()
        name = label.replace(":", "-") + ("" if session is None else f"@{data.sources[0].session.name}")
        output = run / "probes" / (name if usual else f"{name}+{chosen.name}")
    _check_folder(Path(str(output)).expanduser())
    stage(f"training {chosen.name} probes: {len(data.keys)} keys at {', '.join(places)}")
    trained = fit_and_evaluate(data, places, chosen, declared, seed, session, device)
    stage("drawing the page")
    folder = Path(str(output)).expanduser().absolute()
    _write(folder, trained, data, chosen)
    written(folder / "report.html")
    return trained.report


def _check_folder(folder: Path) -> None:
    """Check that the output folder is writable, before anything is fitted."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is not a folder" if not there.is_dir() else "is not writable"
        raise ProbeDataError(f"output: {folder} cannot be written: {there} {why}; choose another --output")


def _candidate_detail(data: ProbeDataset, trained: Trained, kind: Kind) -> CandidateDetail | None:
    """Look at the candidate named beforehand, else at the one most folds chose; None where a sample has no score of its own."""
    report = trained.report
    if report.target != "binary" or kind.within or not trained.probes:
        return None
    (name,) = report.declared.names if report.declared else (Counter(report.best.names).most_common(1)[0][0],)
    number, result = next((n, result) for n, result in enumerate(report.results) if result.name == name)
    folds = nested_folds(data.target, data.groups, report.seed)
    return score_candidate(
        data, result.key, result.positions, kind, result.strength, folds, report.seed, trained.calibrations[number]
    )


def _write(folder: Path, trained: Trained, data: ProbeDataset, kind: Kind) -> None:
    make_folder(folder)
    report = trained.report
    detail = _candidate_detail(data, trained, kind)
    figures = {"auroc_by_layer": plots.by_layer(report)}
    if len(report.positions) > 1:
        figures["heatmap"] = plots.heatmap(report)
    if report.target == "binary" and not report.within:
        figures["reliability"] = plots.reliability(trained.raw[:, 0], data.target.values)
    if detail is not None:
        figures["scores"] = plots.distributions(detail, data.target.values, report.label)
        figures["projection"] = plots.projection(detail, data.target.values, report.label)
        if detail.traces:
            figures["along_trace"] = plots.along_trace(detail, report.label)
    make_folder(folder / "dark")
    for name, figure in figures.items():
        _save(figure, folder / f"{name}.png")
        _save(darken(figure), folder / "dark" / f"{name}.png")  # last, since it changes the figure
    if trained.probes:
        save_probes(folder, trained.probes)
    light, dark = (
        {name: (place / f"{name}.png").read_bytes() for name in figures} for place in (folder, folder / "dark")
    )
    page = render_page(report, light, detail, dark)
    write_text(folder / "report.html", page, errors="replace")
    write_json(folder / "curves.json", curves_of(trained, data, detail))
    write_json(folder / "results.json", report.to_json())


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
