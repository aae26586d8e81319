import re

import pytest
from rich.console import Console

from probes.console import render
from probes.plots import by_layer
from probes.report import Best, Estimate, ProbeReport, Subset
from tests.probes.conftest import auroc_of


def test_a_line_per_hook_point_with_band_and_baselines(report):
    axes = by_layer(report).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["resid_post"].get_xdata()) == [0, 2, 4, 6, 8, 10]
    assert lines["ln_mlp"].get_ydata()[-1] == pytest.approx(0.65)
    assert len([c for c in axes.collections if type(c).__name__ == "FillBetweenPolyCollection"]) == 2
    assert lines["chance"].get_ydata()[0] == 0.5
    assert lines["prompt length (0.55)"].get_ydata()[0] == 0.55


def test_model_wide_keys_stand_beside_the_layers(report):
    axes = by_layer(report).axes[0]
    points = {c.get_label(): float(c.lines[0].get_xdata()[0]) for c in axes.containers}
    assert points == {"embed": -1, "final_norm": 11}


def test_it_is_written_as_png(report, tmp_path):
    by_layer(report).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def printed(report: ProbeReport) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(report))
    return console.export_text()


def test_the_table_has_layers_best_and_baselines(report):
    text = printed(report)
    assert re.search(r"10 +│ 0.70 \[0.60, 0.80\] │ 0.65 \[0.55, 0.75\]", text)
    assert re.search(r"final_norm +0.70 \[0.60, 0.80\] +model-wide", text)
    assert re.search(r"best, chosen on inner folds +0.70 \[0.61, 0.79\] +layers.10.resid_post", text)
    assert re.search(r"prompt length +0.55 \[0.45, 0.65\]", text)
    assert "100 samples of 50 problems, 40% True, 5 folds" in text
    assert "! " not in text


def test_notes_warn_of_what_makes_a_result_weak(report):
    weak = ProbeReport(
        **{
            **vars(report),
            "n_rarest": 4,
            "n_left_out": 3,
            "best": Best(auroc_of(0.6, 0.45, 0.75), ("embed@last_prompt",)),
            "baselines": {**report.baselines, "prompt_length": auroc_of(0.62, 0.5, 0.7)},
            "against": {"prompt_length": Estimate("difference", -0.01, -0.04, 0.03)},
        }
    )
    notes = weak.notes()
    assert "rarest class has 4 samples" in notes[0]
    assert "reaches 0.5" in notes[1]
    assert notes[2].startswith("Prompt length alone does about as well (0.62 [0.50, 0.70]")
    assert "3 samples have no activations" in notes[-1]
    assert all(f"! {note.split(':')[0]}" in printed(weak) for note in notes)


def test_about_as_well_is_a_claim_of_its_own(report):
    """A difference within the margin is equal; a wide interval around it says nothing, and that is said."""

    def note(low: float, high: float) -> list[str]:
        against = {"prompt_length": Estimate("difference", (low + high) / 2, low, high)}
        return ProbeReport(**{**vars(report), "against": against}).notes()

    assert note(0.06, 0.2) == note(0.01, 0.2) == []
    assert "Prompt length alone does about as well (" in note(-0.04, 0.04)[0]
    assert "Prompt length alone does about as well or better (" in note(-0.2, -0.06)[0]
    (unclear,) = note(-0.1, 0.3)
    assert unclear.startswith("This data cannot tell whether the probe does better than prompt length (0.55")


def test_what_is_no_better_than_no_information_is_said(report):
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
        "Its accuracy, 0.89 [0.85, 0.93], is no better than giving the most frequent answer every time (0.91;"
    )
    assert "without reading anything 0.91" in printed(poor)


def test_confounders_are_named(report):
    without = {"unread": Subset(30, auroc_of(0.5, 0.4, 0.6)), "truncated": Subset(20, None, "True")}
    unread, truncated = ProbeReport(**{**vars(report), "without": without}).notes()
    assert unread.startswith("Among samples whose answer could be read it is 0.50")
    assert truncated.startswith("All samples that were not truncated have correct = True")
