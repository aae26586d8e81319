"""A worker's rows: requests that are packed, preempted, computed again, and overrun their end."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.contract import Positions
from serve_app.capture.rows import CapturePlan
from serve_app.capture.structure import Tap
from serve_app.engines.vllm.collecting import Collector, LostRowsError, StepCapture
from serve_app.engines.vllm.worker_messages import CaptureRequest

POLICIES = ["all", "prompt", "generated", "last_prompt", "last", "stride:3", "mean_prompt", "mean_generated"]


def plan(policy: str, dtype: str = "model") -> CapturePlan:
    return CapturePlan({"x": Tap("m", "output")}, Positions.parse(policy), dtype)


def values(job: int, span: range) -> torch.Tensor:
    """What job i has at each position, two numbers wide."""
    return torch.tensor([[1000.0 * job + at, at % 7] for at in span]).reshape(len(span), 2)


def run(collector: Collector, batch: list[tuple[int, range]]) -> None:
    """One forward of jobs' spans, packed."""
    step = collector.step([(str(job), span) for job, span in batch])
    assert isinstance(step, StepCapture)
    assert step.rows is not None
    if step.rows.taps:
        step.rows("x", torch.cat([values(job, span) for job, span in batch]))
    collector.done(step, None)


@settings(max_examples=150, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(
            st.sampled_from(POLICIES),
            st.integers(1, 9),  # prompt
            st.integers(1, 12),  # completion
            st.integers(0, 3),  # tokens beyond the end
            st.lists(st.integers(1, 20), max_size=2),  # lengths at which it is preempted
        ),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_what_is_kept_does_not_depend_on_what_happened(jobs: list[Any], data: st.DataObject) -> None:
    collector = Collector(torch.device("cpu"))
    left = {}
    for number, (policy, n_prompt, n_completion, beyond, preempted) in enumerate(jobs):
        collector.begin(CaptureRequest(str(number), plan(policy)), [0] * n_prompt)
        spans, fed = [range(n_prompt)], n_prompt
        for at in sorted(preempted):
            if fed <= at < n_prompt + n_completion - 1:
                spans += [range(i, i + 1) for i in range(fed, at)]
                spans.append(range(at + 1))  # all of it again, and one more
                fed = at + 1
        spans += [range(i, i + 1) for i in range(fed, n_prompt + n_completion - 1 + beyond)]
        left[number] = spans
    while left:
        chosen = [number for number in left if data.draw(st.booleans())] or [next(iter(left))]
        run(collector, [(number, left[number].pop(0)) for number in chosen])
        left = {number: spans for number, spans in left.items() if spans}
    for number, (policy, n_prompt, n_completion, _, _) in enumerate(jobs):
        n_rows = n_prompt + n_completion - 1
        wanted = list(Positions.parse(policy).select(n_prompt, n_rows))
        expected = values(number, range(n_rows))[wanted]
        rows = collector.take(str(number), [0] * n_rows)
        if policy.startswith("mean"):
            expected, wanted = expected.mean(0, keepdim=True)[: len(wanted)], [-1] * bool(wanted)
        assert rows.position.tolist() == wanted
        torch.testing.assert_close(rows.tensors["x"], expected)
    assert collector.n_jobs == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_token_that_passed_through_no_module_is_missed_where_its_row_is_wanted(policy: str) -> None:
    """The prefix was in vLLM's prefix cache, and its rows were not cached."""
    collector = Collector(torch.device("cpu"))
    collector.begin(CaptureRequest("0", plan(policy)), [0] * 6)
    run(collector, [(0, range(4, 6))])
    if policy in ("generated", "mean_generated", "last_prompt", "last"):
        wanted = [5] if policy.startswith("last") else []
        assert collector.take("0", [0] * 6).position.tolist() == wanted
        return
    with pytest.raises(
        LostRowsError, match="the rows of 4 tokens that were found in the prefix cache have been dropped"
    ):
        collector.take("0", [0] * 6)


def test_tokens_that_are_skipped_later_are_missed() -> None:
    collector = Collector(torch.device("cpu"))
    collector.begin(CaptureRequest("0", plan("all")), [0] * 6)
    run(collector, [(0, range(2))])
    run(collector, [(0, range(4, 6))])
    with pytest.raises(LostRowsError, match="tokens 2–3 were not processed by the model"):
        collector.take("0", [0] * 6)


def test_a_completion_that_is_longer_than_what_passed_is_missed() -> None:
    collector = Collector(torch.device("cpu"))
    collector.begin(CaptureRequest("0", plan("mean_prompt")), [0] * 2)
    run(collector, [(0, range(2))])
    with pytest.raises(LostRowsError, match="2 tokens of this request were processed; 5"):
        collector.take("0", [0] * 5)


def test_a_step_that_could_not_be_read_fails_those_in_it_alone() -> None:
    collector = Collector(torch.device("cpu"))
    for job in ("0", "1"):
        collector.begin(CaptureRequest(job, plan("all")), [0] * 2)
    run(collector, [(0, range(2))])
    step = collector.step([("1", range(2))])
    assert step is not None
    collector.done(step, RuntimeError("no memory"))
    assert collector.take("0", [0] * 2).position.tolist() == [0, 1]
    with pytest.raises(LostRowsError, match="no memory"):
        collector.take("1", [0] * 2)


def test_a_mean_is_taken_before_it_is_rounded() -> None:
    """4,096 ones in bfloat16: a sum in bfloat16 stops at 256, and a mean of rounded parts is not the mean."""
    for dtype, kept in (("model", torch.bfloat16), ("float32", torch.float32)):
        collector = Collector(torch.device("cpu"))
        collector.begin(CaptureRequest("0", plan("mean_generated", dtype)), [0] * 1)
        for span in (range(1), range(1, 4097)):
            step = collector.step([("0", span)])
            assert step is not None
            assert step.rows is not None
            if step.rows.taps:
                ones = torch.ones(len(span), 1)
                ones[::2] = 1.0078125
                step.rows("x", ones.bfloat16())
            collector.done(step, None)
        rows = collector.take("0", [0] * 4097).tensors["x"]
        assert rows.dtype == kept
        assert rows.item() == torch.tensor(1.00390625).to(kept).item()


def test_nobody_else_is_laid_out() -> None:
    collector = Collector(torch.device("cpu"))
    assert collector.step([(None, range(3)), (None, range(7, 8))]) is None
    assert collector.n_jobs == 0
    with pytest.raises(LostRowsError, match="no rows of this request"):
        collector.take("unknown", [0] * 1)
