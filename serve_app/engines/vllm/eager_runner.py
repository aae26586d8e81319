"""nnsight's model runner with one observer of the whole batch, instead of one worker per request.

The model runs module by module, so requests may name any module's input or output.
"""

from typing import Any

from nnsight.modeling.vllm.model_runners.GPUModelRunner import NNsightGPUModelRunner

from serve_app.engines.vllm.batch import Batch
from serve_app.engines.vllm.batch_observer import BatchInterleaver, BatchWorkers
from serve_app.engines.vllm.forced_tokens import ForcesTokens
from serve_app.engines.vllm.fragments import OrderedFragments


class EagerRunner(ForcesTokens, NNsightGPUModelRunner):
    """nnsight's model runner, whose requests share one observer. A mixin for the runner of a device."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and wrap it."""
        super().load_model(*args, **kwargs)
        interleaver = self.nnsight_model.interleaver
        interleaver.__class__ = BatchInterleaver
        interleaver.fragments = OrderedFragments(interleaver.fragments)
        self.batch = Batch(self, self.device)
        self.nnsight_requests = BatchWorkers(self.batch)

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Run a step, and give its requests their rows."""
        output = super().execute_model(scheduler_output, intermediate_tensors)
        self.nnsight_requests.end_step()
        return output
