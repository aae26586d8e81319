"""The requests of one vLLM model runner, and what is wanted of each step: the same however the step's values are read.

vLLM tells its runner of a request when it is scheduled for the first time, and again after a preemption. The request's order
(`orders`) comes with it. Before each forward the runner says which tokens of which requests are in it, in the batch's order.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from serve_app.capture.grid import Strip
from serve_app.engines.vllm.collecting import Collector, Step
from serve_app.engines.vllm.orders import EXTRA, Order, unpack
from serve_app.engines.vllm.prefix_rows import PrefixRows
from serve_app.engines.vllm.watched import Watched


class Batch:
    """Requests and steps; a runner's way to read values adds to it.

    Attributes:
        collector: cuts what is read into requests' rows.
        keeps: whether what requests capture is kept here. Where it is not, it is read all the same: gathering what is split
            takes all ranks.
        watched: who else reads every step, while the model's hook points are verified.
    """

    def __init__(
        self, states: Callable[[], dict[str, Any]], device: torch.device, prefixes: PrefixRows | None = None
    ) -> None:
        """Begin without requests.

        Args:
            states: returns the runner's state of each request, by vLLM's name for it.
            device: the model's.
            prefixes: keeps rows of prompts, where vLLM has a prefix cache.
        """
        self.collector = Collector(device, prefixes)
        self.keeps = True
        self.watched: list[Watched] = []
        self._states = states
        self._jobs: dict[str, str] = {}
        self._step: Step | None = None

    def begin(self, new_requests: Iterable[Any]) -> None:
        """Take the orders of requests that have been scheduled for the first time, or again after a preemption."""
        for data in new_requests:
            order = (data.sampling_params.extra_args or {}).get(EXTRA) if data.sampling_params is not None else None
            if order is None:
                continue
            parsed = unpack(order, Order)
            self._jobs[data.req_id] = parsed.job_id
            self.collector.begin(parsed, data.prompt_token_ids)

    def end(self, finished: set[str]) -> None:
        """Forget vLLM's names of finished requests; their rows wait for the replica."""
        for request_id in finished:
            self._jobs.pop(request_id, None)

    def lay_out(self, spans: list[tuple[str, int]]) -> Step | None:
        """Return what is wanted of the forward that is about to run.

        Args:
            spans: in the batch's order, each request and how many of its tokens are in the forward.
        """
        states, positions = self._states(), []
        for request_id, tokens in spans:
            start = states[request_id].num_computed_tokens
            positions.append((self._jobs.get(request_id), range(start, start + tokens)))
        self._step = self.collector.step(positions)
        for watched in self.watched:
            watched.strip = Strip([span for _, span in positions])
        return self._step

    def watch(self, watched: list[Watched]) -> None:
        """Show every module's values in the next steps to who watches."""
        self.watched = watched

    def unwatch(self) -> list[Watched]:
        """Show them no more; returns who watched."""
        watched, self.watched = self.watched, []
        return watched

    def deliver(self, failure: Exception | None) -> None:
        """Hand out the rows of the step whose forward has been issued.

        Args:
            failure: why they could not be read, if so.
        """
        step, self._step = self._step, None
        if step is not None:
            self.collector.done(step, failure)
