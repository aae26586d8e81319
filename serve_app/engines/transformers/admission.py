"""Admits jobs within a budget of memory that is fixed when the engine starts.

A job reserves the memory of its worst case, its whole prompt and all the tokens it may generate. So an admitted job never runs
out of memory. Keys and values lie in slabs as wide as the longest row, so a batch costs its number of rows times its longest
row. Captured rows cost host memory, per job.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from serve_app.engines.batching import ANY
from serve_app.engines.memory_budget import CPU_SHARE, DEVICE_SHARE, HOST_SHARE, free_host_memory, row_bytes
from serve_app.engines.protocol import GenerationJob, RequestTooLargeError
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.model_cache import CacheSupport, inspect_cache
from serve_app.engines.transformers.prefix_cache import CacheLimits

SLAB_OVERHEAD = 1.25
"""Slabs have a quarter more columns than are in use (`kv_cache`)."""

PREFIX_SHARE = 0.25
"""Largest share of the memory for keys and values, and of that for captured rows, that the prefix cache may take."""


@dataclass(frozen=True)
class Budget:
    """Memory that running jobs may take together."""

    cache_tokens: int
    """Rows times columns of the KV cache."""
    row_bytes: int
    """Captured rows, in bytes."""
    bytes_per_row: int
    """Bytes of one hook point's row, estimated as the residual stream's width."""
    bytes_per_token: int = 0
    """Bytes of one token in the KV cache, over all layers."""

    @classmethod
    def measure(
        cls,
        model: LoadedModel,
        max_cache_tokens: int = 0,
        *,
        max_batch: int = 1,
        cache_support: CacheSupport | None = None,
    ) -> "Budget":
        """Compute the budget from the memory that is free now.

        Args:
            model: loaded, and not running yet.
            max_cache_tokens: upper limit of the KV cache; 0 for what the memory allows.
            max_batch: sequences that may run together; each may have a state of a fixed size.
            cache_support: properties of the model's cache, if they are known already.
        """
        cache_support = cache_support or inspect_cache(model.observed._module, model.device)
        host = free_host_memory()
        if model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(model.device)
            for_cache = int(free * DEVICE_SHARE)
        else:
            for_cache = int(host * CPU_SHARE)
        for_cache = max(0, for_cache - max_batch * cache_support.sequence_bytes)
        tokens = int(for_cache / (max(1, cache_support.token_bytes) * SLAB_OVERHEAD))
        return cls(
            cache_tokens=min(tokens, max_cache_tokens or tokens),
            row_bytes=int(host * HOST_SHARE),
            bytes_per_row=model.structure.d_model * model.dtype.itemsize,
            bytes_per_token=cache_support.token_bytes,
        )

    def check(self, job: GenerationJob) -> None:
        """Reject a job that can never fit.

        Raises:
            RequestTooLargeError: saying what it needs and what there is.
        """
        if total_tokens(job) > self.cache_tokens:
            raise RequestTooLargeError(
                f"the prompt's {len(job.prompt_ids)} tokens and up to {job.sampling.max_tokens} new ones need room for "
                f"{total_tokens(job)} tokens; the KV cache holds {self.cache_tokens}"
            )
        if (size := self._row_bytes(job)) > self.row_bytes:
            raise RequestTooLargeError(
                f"the requested activations may take {size / 1e6:,.0f} MB; {self.row_bytes / 1e6:,.0f} MB are reserved "
                "for them: ask for fewer layers, hook points, positions or tokens"
            )

    def admits(self, running: Sequence[GenerationJob], job: GenerationJob) -> bool:
        """Whether a job fits beside the running jobs."""
        jobs = [*running, job]
        width = max(total_tokens(other) for other in jobs)
        return len(jobs) * width <= self.cache_tokens and sum(map(self._row_bytes, jobs)) <= self.row_bytes

    def room(self, running: Sequence[GenerationJob]) -> CacheLimits:
        """Return the memory that the prefix cache may take: a share of the budget, and no more than running jobs leave."""
        tokens = self.cache_tokens - len(running) * max(map(total_tokens, running), default=0)
        rows = self.row_bytes - sum(map(self._row_bytes, running))
        tokens = min(tokens, int(self.cache_tokens * PREFIX_SHARE))
        return CacheLimits(
            values=max(0, int(tokens * self.bytes_per_token * SLAB_OVERHEAD)),
            rows=max(0, min(rows, int(self.row_bytes * PREFIX_SHARE))),
        )

    def _row_bytes(self, job: GenerationJob) -> int:
        if (collecting := job.collecting) is None:
            return 0
        return row_bytes(collecting, len(job.prompt_ids), total_tokens(job), self.bytes_per_row)


def total_tokens(job: GenerationJob) -> int:
    """Return the largest number of tokens of a job's sequence."""
    return len(job.prompt_ids) + job.sampling.max_tokens


def next_jobs(
    waiting: deque[GenerationJob],
    running: Sequence[GenerationJob],
    budget: Budget,
    max_batch: int,
    max_prefill_tokens: int,
    together: Callable[[int, int], bool] = ANY.together,
    lengths: Sequence[int] = (),
    unread: Callable[[GenerationJob], int] = lambda job: len(job.prompt_ids),
    waits: Callable[[GenerationJob, Sequence[GenerationJob]], bool] = lambda job, taken: False,
) -> list[GenerationJob]:
    """Take the jobs to prefill next, together in one forward, from the queue.

    The first job of the queue always comes first, so none waits forever. The others are those with the most similar number of
    tokens to read, so the forward has little padding.

    Args:
        waiting: the queue; taken jobs are removed.
        running: running jobs.
        budget: memory to stay within.
        max_batch: most jobs that may run together.
        max_prefill_tokens: most tokens of one forward, padding included; a longer prompt is read alone.
        together: whether sequences of two lengths may share a forward.
        lengths: lengths of the running sequences.
        unread: returns how many tokens of a job's prompt must be read.
        waits: whether a job is better read after the jobs that are taken.
    """
    if not waiting or len(running) >= max_batch or not budget.admits(running, waiting[0]):
        return []
    head = waiting[0]
    if not all(together(len(head.prompt_ids), other) for other in lengths):
        return []
    taken = [head]
    length, width = len(head.prompt_ids), unread(head)
    others = [(unread(job), job) for job in list(waiting)[1 : 1 + max_batch]]
    for tokens, job in sorted(others, key=lambda other: abs(other[0] - width)):
        if len(running) + len(taken) >= max_batch or max(tokens, width) * (len(taken) + 1) > max_prefill_tokens:
            break
        fits = together(len(job.prompt_ids), length) and budget.admits([*running, *taken], job)
        if fits and not waits(job, taken):
            taken.append(job)
            width = max(tokens, width)
    chosen = {id(job) for job in taken}
    left = [job for job in waiting if id(job) not in chosen]
    waiting.clear()
    waiting.extend(left)
    return taken


def cache_bytes_per_token(model: LoadedModel) -> int:
    """Measure the bytes of a token in the KV cache, over all layers, by running a few tokens; at least 1."""
    return max(1, inspect_cache(model.observed._module, model.device).token_bytes)
