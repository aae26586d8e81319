"""Runs an engine's forwards, and finds the failing request when a forward fails.

A forward is steered, captured and scored as its requests ask (`capture`). If one of these has no value, only the requests that
asked for it fail. If the forward itself raises, all of its requests are suspects. Each is then tried alone, from its first
token and without observers: those that succeed continue, and the others have failed. If none succeeds, a forward that belongs
to no request distinguishes bad requests from a model that no longer computes anything.
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
    """Runs the forwards of one engine."""

    def __init__(self, model: LoadedModel, cache_support: CacheSupport, memory: RowMemory, max_tokens: int) -> None:
        """Create a runner for a model.

        Args:
            model: run by this runner only.
            cache_support: properties of the model's cache.
            memory: allocates captured rows.
            max_tokens: most tokens of one forward that reads prompts.
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
        """Run the model on new tokens, and steer, capture and score what its jobs ask for.

        A job that cannot have what it asked for fails; the others are not affected.

        Args:
            running: the forward's jobs.
            inputs: their new tokens.
            shapes: computes in shapes that do not depend on the batch; None for the model's own shapes.
            compiled: runs the step, if it exposes every tap of its jobs.

        Returns:
            The logits, and the cache to continue with.
        """
        layout = self._layout(inputs)
        steering = self._steering(running, layout)
        rows = StepRows([one.rows for one in running], layout, self._memory)
        fillers = StepRows([one.filler for one in running], layout, self._memory)
        scores = StepScores([one.probed for one in running], layout, self._memory)
        observers = (steering, rows, fillers, scores)

        def forward() -> Any:
            with shapes or nullcontext():
                return self._forward(inputs)

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

    def replay(self, running: list[RunningJob]) -> Prefill:
        """Read the processed tokens of some jobs again, steered as before; nothing is captured or scored."""
        prefill = Prefill.lay_out(running, self._cache_support.new_cache(), processed_only=True)
        whole = not self._cache_support.continuous or self._model.batching.whole(prefill.width)
        piece = prefill.width if whole else max(1, self._max_tokens // len(running))
        while prefill.done < prefill.width:
            stop = min(prefill.done + piece, prefill.width)
            mask, positions = prefill.inputs(stop)
            self._replay(prefill, ForwardInputs(prefill.tokens[:, prefill.done : stop], mask, positions, prefill.cache))
            prefill.done = stop
        return prefill

    def error_alone(self, one: RunningJob, *, decoding: bool) -> Exception | None:
        """Return the error that a job fails with when it runs alone, up to its next token; None if it succeeds.

        Args:
            one: the job.
            decoding: whether its last token must be read too.
        """
        try:
            prefill = self.replay([one])
            if decoding:
                mask, positions = torch.ones(1, prefill.width + 1, dtype=torch.long), torch.tensor([[prefill.width]])
                self._replay(prefill, ForwardInputs(torch.tensor([one.token_ids[-1:]]), mask, positions, prefill.cache))
        except Exception as error:  # noqa: BLE001 - any error is reported to the request that caused it
            log.warning("a request fails alone: %s: %s", type(error).__name__, error)
            return error
        return None

    def is_responsive(self) -> bool:
        """Whether the model can still run one token that belongs to no request."""
        one = torch.zeros(1, 1, dtype=torch.long)
        try:
            self._forward(ForwardInputs(one, torch.ones_like(one), one, self._cache_support.new_cache()))
        except Exception:
            log.exception("the model no longer responds")
            return False
        return True

    def _replay(self, prefill: Prefill, inputs: ForwardInputs) -> None:
        steering = self._steering(prefill.running, self._layout(inputs))
        output = self._model.observed.run((steering,), lambda: self._forward(inputs))
        prefill.cache = self._cache_support.given(output, inputs.cache)

    def _layout(self, inputs: ForwardInputs) -> PaddedBatch:
        return PaddedBatch.of(inputs.mask[:, -inputs.tokens.shape[1] :], inputs.positions)

    def _steering(self, running: list[RunningJob], layout: PaddedBatch) -> StepSteering:
        return StepSteering([one.job.steering for one in running], [len(one.job.prompt_ids) for one in running], layout)

    def _forward(self, inputs: ForwardInputs) -> Any:
        module = self._model.observed._module
        if inputs.begins:
            forget_lengths(module)
        return module(**self._cache_support.arguments(inputs, self._model.device))
