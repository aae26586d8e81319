"""Tracks the requests of one vLLM model runner, and lays out what each step captures, steers and scores.

vLLM passes a request to its runner when it schedules the request for the first time, and again after a preemption. The
request's `CaptureRequest` (`worker_messages`) comes with it. Before each forward the runner says which tokens of which
requests are in it, in the batch's order. How a step's values are read is up to the runner (`eager_runner`, `graph_runner`).
"""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group

from serve_app.capture.batch_layout import PackedBatch
from serve_app.engines.probe_stopping import Action
from serve_app.engines.vllm.collecting import Collector, StepCapture
from serve_app.engines.vllm.forced_tokens import Forced, forced_by
from serve_app.engines.vllm.prefix_rows import PrefixRows
from serve_app.engines.vllm.recorder import RowRecorder
from serve_app.engines.vllm.worker_messages import EXTRA_ARGS_KEY, CaptureRequest, unpack


class Batch:
    """The requests of a model runner, and its current step. Subclasses add how a step's values are read.

    Attributes:
        collector: splits a step's rows by request.
        keeps: whether this rank keeps captured rows. A rank that does not keep them reads them all the same: gathering sharded
            values takes all ranks.
        recorders: record every step while the model's hook points are verified.
        n_tokens: tokens of the current step.
        actions: per job, the action that its probe scores require before the step's next token is chosen.
    """

    def __init__(self, runner: Any, device: torch.device, prefixes: PrefixRows | None = None) -> None:
        """Create a batch without requests.

        Args:
            runner: vLLM's model runner: it has the state of each request, by vLLM's request id, and the tokens of each step.
            device: the model's device.
            prefixes: keeps rows of prompts, if vLLM has a prefix cache.
        """
        self.collector = Collector(device, prefixes)
        self.keeps = True
        self.recorders: list[RowRecorder] = []
        self.actions: dict[str, Action] = {}
        self._runner = runner
        self._jobs: dict[str, str] = {}
        self._step: StepCapture | None = None
        self.n_tokens = 0

    def begin(self, new_requests: Iterable[Any]) -> None:
        """Register requests that are scheduled for the first time, or again after a preemption."""
        for data in new_requests:
            packed = (
                (data.sampling_params.extra_args or {}).get(EXTRA_ARGS_KEY)
                if data.sampling_params is not None
                else None
            )
            if packed is None:
                continue
            request = unpack(packed, CaptureRequest)
            self._jobs[data.req_id] = request.job_id
            self.collector.begin(request, data.prompt_token_ids)

    def end(self, finished: set[str]) -> None:
        """Drop vLLM's ids of finished requests; their rows wait for the replica."""
        for request_id in finished:
            self._jobs.pop(request_id, None)

    def lay_out(self, spans: list[tuple[str, int]]) -> StepCapture | None:
        """Return what to capture, steer and score in the forward that is about to run.

        Args:
            spans: in the batch's order, each request and how many of its tokens are in the forward.
        """
        states, positions = self._runner.requests, []
        for request_id, tokens in spans:
            start = states[request_id].num_computed_tokens
            positions.append((self._jobs.get(request_id), range(start, start + tokens)))
        self.n_tokens = sum(tokens for _, tokens in spans)
        self._step = self.collector.step(positions)
        for recorder in self.recorders:
            recorder.layout = PackedBatch([span for _, span in positions])
        return self._step

    def start_recording(self, recorders: list[RowRecorder]) -> None:
        """Pass every module's values in the next steps to recorders."""
        self.recorders = recorders

    def stop_recording(self) -> list[RowRecorder]:
        """Stop recording; returns the recorders."""
        recorders, self.recorders = self.recorders, []
        return recorders

    def deliver(self, failure: Exception | None) -> None:
        """Give each request its rows of the step whose forward has been launched.

        Args:
            failure: why the rows could not be read; None if they could.
        """
        step, self._step, self.actions = self._step, None, {}
        if step is None:
            return
        self.collector.done(step, failure)
        if step.may_act:
            found = self.collector.asked(step, self._token_ids) if self.keeps else {}
            # Every rank chooses tokens, but only one has the scores.
            self.actions = get_tp_group().broadcast_object(found)

    def forced(self, request_ids: Iterable[str]) -> dict[int, Forced]:
        """Return the forced tokens of the step, by row.

        Args:
            request_ids: vLLM's request ids, one per row.
        """
        if not self.actions:
            return {}
        found: dict[int, Forced] = {}
        for row, request_id in enumerate(request_ids):
            action = self.actions.get(self._jobs.get(request_id, ""))
            if action is not None:
                found[row] = forced_by(action, self.collector.request(self._jobs[request_id]))
        return found

    def _token_ids(self) -> list[int]:
        tokens: list[int] = self._runner.input_ids.gpu[: self.n_tokens].tolist()
        return tokens
