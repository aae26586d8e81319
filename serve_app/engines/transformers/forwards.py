"""Runs an engine's forwards, and finds out what has failed when one of them has.

A forward is steered, captured and scored as its requests ask (`capture`). What cannot be had of it fails the requests that
asked for it; a forward that raises takes all of its requests down, guilty or not. Then each is tried alone, from its first
token on and observed by nobody: those that pass go on, and only those that do not have failed. If none passes, a forward
that belongs to no request tells a bad request from a model that answers nothing any more.
"""

import logging
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from serve_app.capture.batch_layout import PaddedBatch
from serve_app.capture.probe_scores import StepScores
from serve_app.capture.row_memory import RowMemory
from serve_app.capture.rows import StepRows
from serve_app.capture.steering import StepSteering
from serve_app.engines.transformers.compiled.step import CompiledStep
from serve_app.engines.transformers.invariance import FixedShapes
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.model_cache import CacheSupport, ForwardInputs
from serve_app.engines.transformers.rotation import forget_lengths
from serve_app.engines.transformers.running_job import Prefill, RunningJob

log = logging.getLogger(__name__)


class Forwards:
    """The forwards of one engine."""

    def __init__(self, model: LoadedModel, cache_support: CacheSupport, memory: RowMemory, max_tokens: int) -> None:
        """Take a model.

        Args:
            model: run by this alone.
            cache_support: how it remembers.
            memory: for captured rows.
            max_tokens: the most of one forward that reads prompts.
        """
        self._model = model
        self._cache_support = cache_support
        self._memory = memory
        self._max_tokens = max_tokens

    def run(
        self,
        running: list[RunningJob],
        inputs: ForwardInputs,
        shapes: FixedShapes | None = None,
        compiled: CompiledStep | None = None,
    ) -> tuple[Float[Tensor, "batch kept vocab"], Any]:
        """Run the model on new tokens, steered, captured and scored as is asked.

        Args:
            running: the forward's jobs.
            step: their new tokens.
            shapes: computes in shapes that do not depend on the batch, if that is asked for.
            compiled: runs the step, if it exposes every tap of its jobs.

        A request that cannot have what it asked for is failed here, and no other.

        Returns:
            The logits, and the cache to go on with.
        """
        layout = self._layout(inputs)
        steering = self._steering(running, layout)
        rows = StepRows([one.rows for one in running], layout, self._memory)
        fillers = StepRows([one.filler for one in running], layout, self._memory)
        scores = StepScores([one.probed for one in running], layout, self._memory)
        observers = (steering, rows, fillers, scores)

        def forward() -> Any:
            with shapes or nullcontext():
                return self._bare(inputs)

        if compiled is not None and compiled.exposes(observers):
            logits, cache = compiled.run(inputs, observers), inputs.cache
        else:
            output = self._model.observed.run(observers, forward)
            logits, cache = output.logits, self._cache_support.given(output, inputs.cache)
        rows.deliver()
        fillers.deliver()
        scores.deliver()
        unsteered = steering.failures
        for row, one in enumerate(running):
            found = (unsteered.get(row), one.rows and one.rows.failure, one.probed and one.probed.failure)
            failure = next((error for error in found if error), None)
            if failure is not None and not one.job.cancelled.is_set():
                one.fail(failure)
        return logits, cache

    def replayed(self, running: list[RunningJob]) -> Prefill:
        """Read again what has passed through the model of some jobs, steered as it was; nothing else is observed."""
        prefill = Prefill.lay_out(running, self._cache_support.new_cache(), processed_only=True)
        whole = not self._cache_support.continuous or self._model.batching.whole(prefill.width)
        piece = prefill.width if whole else max(1, self._max_tokens // len(running))
        while prefill.done < prefill.width:
            stop = min(prefill.done + piece, prefill.width)
            mask, positions = prefill.inputs(stop)
            self._replay(prefill, ForwardInputs(prefill.tokens[:, prefill.done : stop], mask, positions, prefill.cache))
            prefill.done = stop
        return prefill

    def failure_alone(self, one: RunningJob, *, decoding: bool) -> Exception | None:
        """Return why a job fails when it runs alone, up to its next token; None if it does not.

        Args:
            one: the job.
            decoding: whether its last token is to be read too.
        """
        try:
            prefill = self.replayed([one])
            if decoding:
                mask, positions = torch.ones(1, prefill.width + 1, dtype=torch.long), torch.tensor([[prefill.width]])
                self._replay(prefill, ForwardInputs(torch.tensor([one.token_ids[-1:]]), mask, positions, prefill.cache))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the request that caused it
            log.warning("a request fails alone: %s: %s", type(error).__name__, error)
            return error
        return None

    def answers(self) -> bool:
        """Whether the model still answers, to a token of nobody's."""
        one = torch.zeros(1, 1, dtype=torch.long)
        try:
            self._bare(ForwardInputs(one, torch.ones_like(one), one, self._cache_support.new_cache()))
        except Exception:
            log.exception("the model answers nothing")
            return False
        return True

    def _replay(self, prefill: Prefill, inputs: ForwardInputs) -> None:
        steering = self._steering(prefill.running, self._layout(inputs))
        output = self._model.observed.run((steering,), lambda: self._bare(inputs))
        prefill.cache = self._cache_support.given(output, inputs.cache)

    def _layout(self, inputs: ForwardInputs) -> PaddedBatch:
        return PaddedBatch.of(inputs.mask[:, -inputs.tokens.shape[1] :], inputs.positions)

    def _steering(self, running: list[RunningJob], layout: PaddedBatch) -> StepSteering:
        return StepSteering([one.job.steering for one in running], [len(one.job.prompt_ids) for one in running], layout)

    def _bare(self, inputs: ForwardInputs) -> Any:
        module = self._model.observed._module
        if inputs.begins:
            forget_lengths(module)
        return module(**self._cache_support.arguments(inputs, self._model.device))
