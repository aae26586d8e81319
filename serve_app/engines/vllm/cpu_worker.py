"""An adapter, so that this engine can be run and tested without a GPU: nnsight's runner over vLLM's CPU build.

nnsight instruments vLLM's GPU model runner and worker. vLLM's CPU runner is the same class with its device calls replaced, so
nnsight's fits on top of it. Nothing is captured differently here; there are no CUDA graphs, no streams and no pinned memory.
"""

import os

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from serve_app.engines.vllm.chosen_tokens import ScoresChosenTokens
from serve_app.engines.vllm.eager_runner import EagerRunner
from serve_app.engines.vllm.graph_runner import GraphRunner
from serve_app.engines.vllm.lifetime import EndsWithReplica
from serve_app.engines.vllm.worker import Capturing, CapturingInGraph, take_over


class CpuEagerRunner(EagerRunner, CPUModelRunner):
    """nnsight's model runner, on a CPU."""


class CpuGraphRunner(GraphRunner, CPUModelRunner):
    """A model runner with taps in the graph, on a CPU."""


class CpuEagerWorker(Capturing, CPUWorker):
    """A CPU's worker, whose model runs module by module."""

    def init_device(self) -> None:
        """Make the device ready, and have its model runner observe."""
        super().init_device()
        take_over(self.model_runner, CPUModelRunner, CpuEagerRunner)


class CpuGraphWorker(CapturingInGraph, CPUWorker):
    """A CPU's worker, whose model has taps in its graph."""

    def init_device(self) -> None:
        """Make the device ready, and have its model runner tap."""
        super().init_device()
        take_over(self.model_runner, CPUModelRunner, CpuGraphRunner)


class CpuPlainWorker(ScoresChosenTokens, EndsWithReplica, CPUWorker):
    """A CPU's worker that captures nothing: vLLM's own."""


def prepare_cpu(threads: int, ranks: int) -> None:
    """Make this process ready to start vLLM's engine on a CPU.

    The engine's core and its worker are one process then, as they are with one GPU: vLLM would otherwise keep a core of its
    own for the former. What its workers take from the environment is set here, and stays set.

    Args:
        threads: for each rank to compute with; 0 for what cores there are.
        ranks: workers that the model is split over.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # to vLLM's CPU platform, this forbids one process for both
    # A prompt's activations are tens of megabytes, which the C library would give back and ask for again at every step.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 30))
    os.environ["OMP_NUM_THREADS"] = str(threads or max(len(os.sched_getaffinity(0)) // ranks, 1))
    if ranks > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM would want a NUMA node for each
    # nnsight builds the model's skeleton in this process too, after which vLLM frees an accelerator's memory.
    torch.accelerator.empty_cache = lambda: None
