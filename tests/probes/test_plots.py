import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from rich.console import Console

from probes.candidate_detail import CandidateDetail
from probes.plots import by_layer, distributions, heatmap, projection, reliability
from probes.report import Best, Estimate, ProbeReport, Subset
from probes.styles import CLASSES, COLORS, DARK_INK, REFERENCE, darken
from probes.terminal_report import render
from tests.probes.conftest import auroc_of


def test_a_line_per_hook_point_with_band_and_baselines(report: ProbeReport) -> None:
    axes = by_layer(report).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["resid_post"].get_xdata()) == [0, 2, 4, 6, 8, 10]
    assert lines["ln_mlp"].get_ydata()[-1] == pytest.approx(0.65)
    assert len([c for c in axes.collections if type(c).__name__ == "FillBetweenPolyCollection"]) == 2
    assert lines["chance"].get_ydata()[0] == 0.5
    assert lines["prompt length (0.55)"].get_ydata()[0] == 0.55


def test_model_wide_keys_stand_beside_the_layers(report: ProbeReport) -> None:
    axes = by_layer(report).axes[0]
    points = {c.get_label(): float(c.lines[0].get_xdata()[0]) for c in axes.containers}
    assert points == {"embed": -1, "final_norm": 11}


def test_it_is_written_as_png(report: ProbeReport, tmp_path: Path) -> None:
    by_layer(report).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_several_hook_points_and_positions_look_different(report: ProbeReport) -> None:
    other = tuple(replace(result, positions="at:0.5") for result in report.results)
    figure = by_layer(replace(report, positions=("last_prompt", "at:0.5"), results=report.results + other))
    lines = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    own = [look for label, look in lines.items() if str(label).startswith(("resid_post@", "ln_mlp@"))]
    assert len(set(own)) == len(own) == 4


@pytest.mark.parametrize("rare", [True, False])
def test_the_rare_class_is_as_visible_as_the_common_one(rare: int) -> None:
    """Two samples among a thousand, in the midst of the others."""
    scores = np.concatenate([np.linspace(-3, 3, 1000), [-0.5, 0.5]])
    y = np.concatenate([np.full(1000, not rare), np.full(2, rare)])
    detail = CandidateDetail("layers.1.resid_post@last", scores, np.zeros(1002), ())
    (axes,) = distributions(detail, y, "correct").axes
    steps = {patch.get_label(): patch for patch in axes.patches if patch.get_label()}
    assert set(steps) == {f"correct is {rare} (n = 2)", f"correct is {not rare} (n = 1000)"}
    for step in steps.values():
        assert step.get_data().values.sum() == pytest.approx(1)  # shares of the class
        assert not step.get_fill()  # an outline hides nothing
    assert max(steps[f"correct is {rare} (n = 2)"].get_data().values) == 0.5
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    (axes,) = projection(detail, y, "correct").axes
    below, above = sorted(axes.collections, key=lambda cloud: axes.get_children().index(cloud))
    assert (len(below.get_offsets()), len(above.get_offsets())) == (1000, 2)
    assert above.get_sizes()[0] > below.get_sizes()[0]


def test_scores_far_from_the_threshold_fill_the_figure() -> None:
    scores = np.linspace(-3.5, -3.3, 50)
    detail = CandidateDetail("layers.1.resid_post@last", scores, np.zeros(50), ())
    for draw in (distributions, projection):
        low, high = draw(detail, np.arange(50) % 2 == 0, "correct").axes[0].get_xlim()
        assert -4 < low < high < -3


def test_every_figure_has_named_axes_with_ticks(report: ProbeReport) -> None:
    y = np.arange(60) % 3 == 0
    detail = CandidateDetail("layers.1.resid_post@last", np.linspace(-1, 1, 60), np.zeros(60), ())
    for figure in (
        by_layer(report),
        heatmap(report),
        reliability(detail.scores, y),
        projection(detail, y, "correct"),
    ):
        for axes in figure.axes:
            assert axes.get_ylabel()
            assert len(axes.get_yticks()) > 0
        assert any(axes.get_xlabel() and len(axes.get_xticks()) for axes in figure.axes)


def test_a_dark_figure_has_light_ink_and_no_background(report: ProbeReport) -> None:
    figure, ink = by_layer(report), []
    for _ in range(2):
        figure.savefig(file := io.BytesIO(), format="png")
        pixels = np.asarray(Image.open(file).convert("RGBA"), dtype=float)
        opaque = pixels[pixels[..., 3] > 250][:, :3]
        ink.append((pixels[0, 0].tolist(), float((opaque.max(1) < 60).sum()), float((opaque.min(1) > 200).sum())))
        darken(figure)
    (light, dark_ink, _), (dark, left_over, light_ink) = ink
    assert (light, dark[3]) == ([255, 255, 255, 255], 0)
    assert dark_ink > 1000
    assert left_over < 10
    assert light_ink > 1000


@pytest.mark.parametrize("background", ["#ffffff", "#1b1f25"])
def test_lines_and_points_stand_out_against_both_backgrounds(background: str) -> None:
    """WCAG 2.2, 1.4.11: parts of graphics have a contrast of at least 3 to 1."""
    assert (
        min(contrast(color, background) for color in (*COLORS, REFERENCE, *(c["color"] for c in CLASSES.values()))) >= 3
    )
    assert contrast(DARK_INK, "#1b1f25") >= 4.5


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    channels = np.array(to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def printed(report: ProbeReport, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(report))
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 81, 140])
def test_a_probes_name_is_whole_at_any_width(report: ProbeReport, width: float) -> None:
    lines = [line.strip() for line in printed(report, width).splitlines()]
    for name in report.best.names:
        assert f"best: {name}" in lines


def test_the_table_has_layers_best_and_baselines(report: ProbeReport) -> None:
    text = printed(report)
    assert re.search(r"10 +│ 0.70 \[0.60, 0.80\] │ 0.65 \[0.55, 0.75\]", text)
    assert re.search(r"final_norm +0.70 \[0.60, 0.80\] +model-wide", text)
    assert re.search(r"best, chosen on inner folds +0.70 \[0.61, 0.79\]", text)
    assert re.search(r"prompt length +0.55 \[0.45, 0.65\]", text)
    assert "100 samples of 50 problems, 40 True (40.0%), 5 folds" in text
    assert "! " not in text


def test_the_table_names_positions_where_there_are_several(report: ProbeReport) -> None:
    other = tuple(replace(result, positions="mean_generated") for result in report.results)
    text = printed(replace(report, positions=("last_prompt", "mean_generated"), results=report.results + other))
    for place in ("last_prompt", "mean_generated"):
        assert re.search(rf"10 +│ {place} +│ 0.70 \[0.60, 0.80\] │ 0.65", text)
        assert re.search(rf"final_norm@{place} +0.70", text)


def test_notes_warn_of_what_makes_a_result_weak(report: ProbeReport) -> None:
    weak = ProbeReport(
        **{
            **vars(report),
            "n_rarest": 4,
            "n_left_out": 3,
            "best": Best(auroc_of(0.6, 0.45, 0.75), ("embed@last_prompt",)),
            "baselines": {**report.baselines, "prompt_length": auroc_of(0.62, 0.52, 0.7)},
            "against": {"prompt_length": Estimate("difference", -0.01, -0.04, 0.03)},
        }
    )
    notes = weak.notes()
    assert "rarest class has 4 samples" in notes[0]
    assert "reaches 0.5" in notes[1]
    assert notes[2].startswith("Prompt length alone does about as well (0.62 [0.52, 0.70]")
    assert "3 samples were excluded because they have no activations" in notes[-1]
    assert all(f"! {note.split(':')[0]}" in printed(weak) for note in notes)
    # A baseline that may know nothing either is part of what the second note says.
    unknowing = {**weak.baselines, "prompt_length": auroc_of(0.62, 0.5, 0.7)}
    assert ProbeReport(**{**vars(weak), "baselines": unknowing}).notes() == [*notes[:2], notes[-1]]


def test_about_as_well_is_a_claim_of_its_own(report: ProbeReport) -> None:
    """A difference within the margin is equal; a wide interval around it says nothing, and that is said."""

    def note(low: float, high: float) -> list[str]:
        against = {"prompt_length": Estimate("difference", (low + high) / 2, low, high)}
        return ProbeReport(**{**vars(report), "against": against}).notes()

    assert note(0.06, 0.2) == note(0.01, 0.2) == []
    assert "Prompt length alone does about as well (" in note(-0.04, 0.04)[0]
    assert "Prompt length alone does about as well or better (" in note(-0.2, -0.06)[0]
    (unclear,) = note(-0.1, 0.3)
    assert unclear.startswith("This data does not show whether the probe is better than prompt length (0.55")


def test_what_is_no_better_than_no_information_is_said(report: ProbeReport) -> None:
    """Accuracy 0.89 where always False has 0.91, with a rank order that looks well."""
    metrics = {"accuracy": Estimate("accuracy", 0.89, 0.85, 0.93), "brier": Estimate("brier", 0.07, 0.05, 0.09)}
    forecast = {"accuracy": Estimate("accuracy", 0.91, 0.86, 0.95), "brier": Estimate("brier", 0.08, 0.06, 0.1)}
    gains = {
        "accuracy": Estimate("difference", -0.02, -0.05, 0.01),
        "brier": Estimate("difference", -0.01, -0.02, -0.002),
    }
    best = Best(report.best.estimate, report.best.names, metrics)
    poor = ProbeReport(**{**vars(report), "best": best, "forecast": forecast, "gains": gains})
    (said,) = poor.notes()
    assert said.startswith(
        "Its accuracy, 0.89 [0.85, 0.93], is no better than always predicting the most frequent class (0.91;"
    )
    assert "without any input 0.91" in printed(poor)


def test_confounders_are_named(report: ProbeReport) -> None:
    without = {"unread": Subset(30, auroc_of(0.5, 0.4, 0.6)), "truncated": Subset(20, None, "True")}
    unread, truncated = ProbeReport(**{**vars(report), "without": without}).notes()
    assert unread.startswith("On samples with an extracted answer it is 0.50")
    assert truncated.startswith("All samples that were not truncated have correct = True")
