"""Scores of every sample and token, against scikit-learn fitted per fold on the planted features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probes.candidate_detail import MOST_TRACES, CandidateDetail, score_candidate
from probes.dataset import ProbeDataset
from probes.folds import nested_folds
from probes.kinds import KINDS
from probes.plots import along_trace, projection
from roentgen.runs import Run
from tests.probes.conftest import N_COMPLETION, N_PROMPT, N_ROWS, BuildRun, Plant

KEY = "layers.1.resid_post"


@pytest.fixture
def run(build_run: BuildRun, planted: Plant) -> Run:
    return build_run(*planted([KEY], KEY))


def look(data: ProbeDataset) -> CandidateDetail:
    folds = nested_folds(data.target, data.groups, 0)
    return score_candidate(data, KEY, "last_prompt", KINDS["logistic"], 0.01, folds)


def test_samples_and_tokens_are_scored_by_the_probe_that_had_not_seen_them(run: Run, planted: Plant) -> None:
    features, correct = planted([KEY], KEY)
    X, y = features[KEY].double().numpy(), np.array(correct)
    data = ProbeDataset.open(run.path)
    detail = look(data)
    number = {example.problem: i for i, example in enumerate(data.examples)}
    traces = {trace.example.problem: trace for trace in detail.traces}
    assert len(traces) == len(y)
    original = [int(example.problem.split("-")[1]) for example in data.examples]
    X, y = X[original], y[original]
    for fold in nested_folds(data.target, data.groups, 0):
        scaler = StandardScaler().fit(X[fold.train])
        probe = LogisticRegression(C=0.01, tol=1e-10, max_iter=10_000).fit(
            scaler.transform(X[fold.train]), y[fold.train]
        )
        np.testing.assert_allclose(
            detail.scores[fold.test], probe.decision_function(scaler.transform(X[fold.test])), atol=1e-3
        )
        for i in fold.test[:5]:
            trace = traces[data.examples[i].problem]
            rows = X[i] + 100.0 * (np.arange(N_ROWS) - (N_PROMPT - 1))[:, None]  # as conftest lays them out
            expected = probe.decision_function(scaler.transform(rows))
            np.testing.assert_allclose(trace.scores, expected, rtol=1e-3, atol=1e-2)
            assert trace.value == y[number[trace.example.problem]]
            assert trace.tokens == tuple("abcdef")
            assert len(trace.tokens) == N_PROMPT + N_COMPLETION


def test_across_is_what_the_probe_does_not_see(run: Run) -> None:
    """A large variation that has nothing to do with the label is found, and the label is not in it."""
    data = ProbeDataset.open(run.path)
    detail = look(data)
    y = data.target.values
    assert abs(np.corrcoef(detail.scores, y)[0, 1]) > 0.7
    assert abs(np.corrcoef(detail.across, y)[0, 1]) < 0.3


def test_pictures_have_a_line_and_a_cloud_per_class(run: Run) -> None:
    data = ProbeDataset.open(run.path)
    detail = look(data)
    (axes,) = along_trace(detail, "correct").axes
    lines = {line.get_label(): line for line in axes.lines}
    high, low = (lines[f"correct is {value} (n = 40 traces)"] for value in (True, False))
    assert high.get_ydata()[0] > low.get_ydata()[0]
    own = [trace.scores[N_PROMPT - 1] for trace in detail.traces if trace.value]
    assert high.get_ydata()[0] == pytest.approx(np.mean(own))
    (axes,) = projection(detail, data.target.values, "correct").axes
    assert [len(cloud.get_offsets()) for cloud in axes.collections] == [40, 40]


def test_traces_that_were_not_stored_are_left_out(build_run: BuildRun, planted: Plant) -> None:
    features, correct = planted([KEY], KEY)
    run = build_run(features, correct, positions="last")
    data = ProbeDataset.open(run.path)
    folds = nested_folds(data.target, data.groups, 0)
    assert score_candidate(data, KEY, "last", KINDS["logistic"], 0.01, folds).traces == ()


def test_only_so_many_traces_are_read(build_run: BuildRun) -> None:
    n = MOST_TRACES + 60
    features = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    run = build_run({KEY: features}, [i % 4 > 0 for i in range(n)])
    traces = look(ProbeDataset.open(run.path)).traces
    assert [sum(trace.value == value for trace in traces) for value in (True, False)] == [100, 65]
