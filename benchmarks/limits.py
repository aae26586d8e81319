"""The theoretical limits of this machine: its measured memory bandwidth and arithmetic throughput.

A forward pass over `n` tokens reads all weights once and performs two operations per weight and token, so it takes at least
the longer of the two times. Attention and the KV cache add to that and are ignored: the result is a lower bound.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

MATVEC_BYTES = 512 << 20
MATMUL_SIZE = 2048
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """A machine's limits."""

    bytes_per_s: float
    """Weights read, in a product with one vector."""
    flops: float
    """Operations per second in one dtype, in a product of large matrices."""

    def forward_s(self, weights: "WeightBytes", n_tokens: int, n_logits: int) -> float:
        """Return the seconds that a forward over `n_tokens` tokens takes at least, if `n_logits` of them need logits."""
        operations = 2 * (n_tokens * weights.body + n_logits * weights.head)
        return max(weights.n_bytes / self.bytes_per_s, operations / self.flops)

    def generation_s(
        self, weights: "WeightBytes", prompts: int, prompt_tokens: int, generated: int, in_flight: int
    ) -> float:
        """Return the seconds that a workload takes at least: all prompts read at once, then steps of `in_flight` tokens.

        Args:
            weights: of the model.
            prompts: how many.
            prompt_tokens: of all of them.
            generated: tokens; the first of each prompt comes with the reading.
            in_flight: tokens of a step.
        """
        steps = (generated - prompts) / in_flight
        read_s = self.forward_s(weights, prompt_tokens, prompts)
        return read_s + steps * self.forward_s(weights, in_flight, in_flight)


@dataclass(frozen=True)
class WeightBytes:
    """The weights that every forward uses: all but an embedding that only looks rows up."""

    body: int
    """Numbers that every token meets."""
    head: int
    """Numbers of the output head, which only tokens whose logits are wanted meet."""
    n_bytes: int
    """Size of both."""

    @classmethod
    def of(cls, model: nn.Module) -> "WeightBytes":
        """Count a model's; `get_input_embeddings` and `get_output_embeddings` say which matrix is which."""
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        head = model.get_output_embeddings().weight  # type: ignore[operator]
        body = [p for p in model.parameters() if p is not embedding and p is not head]
        return cls(sum(p.numel() for p in body), head.numel(), sum(p.nbytes for p in [*body, head]))


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the best of some runs of a matrix-vector and a matrix-matrix product.

    Memory has one bandwidth whatever the dtype: it is read as float32, since a CPU's product of a bfloat16 matrix with one
    vector is slower than the memory.
    """
    matrix = torch.ones(MATVEC_BYTES // 4 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    square = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype)
    with torch.inference_mode():
        read_s = _best(lambda: matrix @ vector, device)
        compute_s = _best(lambda: square @ square, device)
    return Limits(matrix.nbytes / read_s, 2 * MATMUL_SIZE**3 / compute_s)


def _best(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
