"""nnsight's own worker over vLLM's CPU build, to measure its way of capturing: a worker per request and block."""

from nnsight.modeling.vllm.model_runners.GPUModelRunner import NNsightGPUModelRunner
from nnsight.modeling.vllm.workers.GPUWorker import NNsightGPUWorker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class NnsightCpuRunner(NNsightGPUModelRunner, CPUModelRunner):
    """nnsight's model runner, on a CPU."""


class NnsightCpuWorker(CPUWorker):
    """A CPU's worker with what nnsight's has."""

    collect_nnsight = NNsightGPUWorker.collect_nnsight
    nnsight_request_count = NNsightGPUWorker.nnsight_request_count
    nnsight_register = NNsightGPUWorker.nnsight_register
    nnsight_clear_registered = NNsightGPUWorker.nnsight_clear_registered

    def init_device(self) -> None:
        """Make the device ready, and have its model runner interleave."""
        super().init_device()
        self.model_runner.__class__ = NnsightCpuRunner
