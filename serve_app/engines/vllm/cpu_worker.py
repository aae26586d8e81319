"""Runs this engine on vLLM's CPU build, so that it can be used and tested without a GPU.

nnsight instruments vLLM's GPU model runner and worker. vLLM's CPU runner is the same class with its device calls replaced, so
nnsight's code works on it. Capture is the same; there are no CUDA graphs, no streams and no pinned memory.
"""

import os

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from serve_app.engines.vllm.chosen_tokens import ScoresChosenTokens
from serve_app.engines.vllm.eager_runner import EagerRunner
from serve_app.engines.vllm.graph_runner import GraphRunner
from serve_app.engines.vllm.lifetime import ExitsWithReplica
from serve_app.engines.vllm.worker import Capturing, CapturingInGraph, take_over


class CpuEagerRunner(EagerRunner, CPUModelRunner):
    """nnsight's model runner, on a CPU."""


class CpuGraphRunner(GraphRunner, CPUModelRunner):
    """A model runner with taps in the graph, on a CPU."""


class CpuEagerWorker(Capturing, CPUWorker):
    """A CPU worker whose model runs module by module."""

    def init_device(self) -> None:
        """Initialize the device, and replace the model runner's class."""
        super().init_device()
        take_over(self.model_runner, CPUModelRunner, CpuEagerRunner)


class CpuGraphWorker(CapturingInGraph, CPUWorker):
    """A CPU worker whose model has taps in its graph."""

    def init_device(self) -> None:
        """Initialize the device, and replace the model runner's class."""
        super().init_device()
        take_over(self.model_runner, CPUModelRunner, CpuGraphRunner)


class CpuPlainWorker(ScoresChosenTokens, ExitsWithReplica, CPUWorker):
    """A CPU worker that captures nothing: vLLM's own."""


def prepare_cpu(threads: int, ranks: int) -> None:
    """Prepare this process to start vLLM's engine on a CPU.

    The engine's core and its worker then share one process, as they do with one GPU; vLLM would otherwise reserve a CPU core
    for the engine's core. The environment variables that its workers read are set here and stay set.

    Args:
        threads: threads per rank; 0 for one per available core.
        ranks: number of workers that the model is split over.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM's CPU platform would not allow one process for both
    # A prompt's activations take tens of megabytes, which the C library would return to the system and request again in every
    # step.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 30))
    os.environ["OMP_NUM_THREADS"] = str(threads or max(len(os.sched_getaffinity(0)) // ranks, 1))
    if ranks > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM would require a NUMA node per rank
    # nnsight also builds the model's skeleton in this process, after which vLLM frees an accelerator's memory.
    torch.accelerator.empty_cache = lambda: None
