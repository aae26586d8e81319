"""inspect_ai, unmodified, through its openai-compatible provider: a GSM8K-shaped task whose activations are kept."""

import pytest
from inspect_ai.log import list_eval_logs, read_eval_log

from roentgen.store import Session
from tests.clients.conftest import Documentation
from tests.conftest import Server

pytestmark = pytest.mark.integration


def test_gsm8k_runs_scores_and_keeps_activations(docs: Documentation, server: Server) -> None:
    docs.run("inspect")
    (found,) = list_eval_logs(str(docs.folder / "logs"))
    log = read_eval_log(found)
    assert log.status == "success"
    assert log.samples is not None
    assert len(log.samples) == 4
    for sample in log.samples:
        assert sample.error is None
        assert sample.scores is not None
        assert sample.scores["match"].value in ("C", "I")
        assert sample.output.completion
        assert sample.output.usage is not None
        assert sample.output.usage.output_tokens > 0
        assert sample.output.stop_reason in ("stop", "max_tokens")
    assert log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value in (0, 0.25, 0.5, 0.75, 1)
    rollouts = Session.open(str(server.store / "inspect")).rollouts()
    assert len(rollouts) == 4
    for sample in log.samples:  # samples run at once, so they are stored in any order
        assert sum(str(sample.input) in text for text in rollouts["text"]) == 1
