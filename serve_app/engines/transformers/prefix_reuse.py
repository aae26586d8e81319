"""Reuses the common prefix of prompts: reads a prompt only from where it differs from earlier ones, and caches what is read.

An admitted job takes from the cache (`prefix_cache`) the keys and values of its prompt's first blocks, and the rows of them
that it needs: those that it captures, and those that its probes score. It takes no block that lacks one of these, so nothing
is ever missing. The tokens of such a block are read again, and the block then has the rows. The last token of a prompt is
always read, because its logits decide the first token.

A prompt's blocks are added to the cache when all of the prompt has been read, and a completion's blocks when it has ended.
Their rows are those that the job captures anyway. If that is not every row of a block (every k-th row, a mean, scores only), a
second capture keeps all rows while the prompt is read (`RunningJob.filler`).

Jobs that wait together and share a long prefix that is not cached are not read together. The first reads the prefix; the
others are read a round later and find it (`PrefixReuse.waits`).

In batch-invariant mode, a block is as long as a piece of a prompt, so cached values were computed in the same shapes in which
they would be computed again. The tokens of completions were not, and are not cached.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from serve_app.capture.row_memory import RowMemory
from serve_app.capture.rows import KnownRows, RequestRows
from serve_app.capture.structure import Tap
from serve_app.engines.prefix_blocks import WHOLE_POLICIES, filler_plan, name_blocks, needed_taps
from serve_app.engines.protocol import SWITCHED_OFF, GenerationJob, PrefixCaching
from serve_app.engines.transformers.invariance import PIECE
from serve_app.engines.transformers.kv_cache import BatchRows, SlotRows
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.model_cache import CacheSupport
from serve_app.engines.transformers.prefix_cache import Block, CacheLimits, KeyValues, PrefixCache
from serve_app.engines.transformers.rotation import depends_on_length
from serve_app.engines.transformers.running_job import Prefill, RunningJob

BLOCK = {"cpu": 32, "cuda": 16}
"""Tokens of a block."""


def prefix_caching(model: LoadedModel, cache_support: CacheSupport, *, asked: bool) -> PrefixCaching:
    """Decide whether a model's prefixes can be cached.

    Args:
        model: the loaded model.
        cache_support: properties of its cache.
        asked: whether the configuration enables it.
    """
    if not asked:
        return PrefixCaching(False, SWITCHED_OFF)
    if not cache_support.continuous or cache_support.alone:
        return PrefixCaching(False, "the model's cache is not keys and values per token")
    if model.batching.kind != "any":
        return PrefixCaching(
            False, f"not all requests may share a forward ({model.batching.kind}): {model.batching.reason}"
        )
    if depends_on_length(model.observed._module):
        return PrefixCaching(False, "a token's rotation depends on how long its sequence is")
    if model.checks.decoding_error:
        return PrefixCaching(False, "the model has other rows with its cache than without")
    return PrefixCaching(True)


def most_known(job: GenerationJob) -> int:
    """Return the largest number of a prompt's tokens that may be left unread."""
    if job.score_prompt:
        return 0
    most = len(job.prompt_ids)
    if job.capture is not None and job.capture.positions.policy == "last" and job.capture.stop is not None:
        most = max(min(most, job.capture.stop), 1)
    return most - 1


def given(job: GenerationJob, span: range, stop: int) -> set[Tap]:
    """Return the taps at which reading a job's prompt captures all rows of a block."""
    taps: set[Tap] = set()
    n_prompt = len(job.prompt_ids)
    for plan in (job.capture, filler_plan(job, stop)):
        if (
            plan is not None
            and plan.positions.policy in WHOLE_POLICIES
            and plan.kept(n_prompt, span.start, span.stop) == span
        ):
            taps |= set(plan.taps.values())
    return taps


class PrefixReuse:
    """The prefix cache of one engine.

    Attributes:
        state: whether prefixes are cached.
        hits: prompt tokens that were found.
        misses: prompt tokens that were looked up and had to be read.
    """

    def __init__(
        self, model: LoadedModel, cache_support: CacheSupport, memory: RowMemory, *, asked: bool, batch_invariant: bool
    ) -> None:
        """Create an empty cache.

        Args:
            model: the engine's model.
            cache_support: properties of its cache.
            memory: allocates captured rows.
            asked: whether the configuration enables the cache.
            batch_invariant: whether the engine is batch-invariant.
        """
        self.state = prefix_caching(model, cache_support, asked=asked)
        self.hits = self.misses = 0
        self._memory = memory
        self._row_bytes = model.structure.d_model * model.dtype.itemsize
        self._exact = batch_invariant
        self._room = CacheLimits(0, 0)
        self.cache = PrefixCache(PIECE if batch_invariant else BLOCK[model.device.type], self._room)
        self._layout: KeyValues | None = None
        self._names: WeakKeyDictionary[GenerationJob, list[bytes]] = WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Size of the cache in bytes."""
        return self.cache.value_bytes + self.cache.row_bytes

    def expect(self, job: GenerationJob) -> None:
        """Compute the block names of a submitted job, on its caller's thread."""
        if self.state.enabled:
            self._names[job] = name_blocks(job, job.prompt_ids, self.cache.size)

    def known(self, job: GenerationJob) -> int:
        """Return how many tokens of a waiting job's prompt must be read."""
        most = most_known(job)
        if not self.state.enabled or not most:
            return 0
        count = self.cache.count(self._names[job], lambda span: needed_taps(job, span)) * self.cache.size
        if self._exact:
            return min(count, most // self.cache.size * self.cache.size)
        return min(count, most)

    def unread(self, job: GenerationJob) -> int:
        """Return how many tokens of a waiting job's prompt are to be read."""
        return len(job.prompt_ids) - self.known(job)

    def waits(self, job: GenerationJob, taken: Sequence[GenerationJob]) -> bool:
        """Whether a job had better wait for others: they will read at least half of what it has to read."""
        if not self.state.enabled or not most_known(job):
            return False
        known, size, names = self.known(job), self.cache.size, self._names[job]
        for other in taken:
            theirs, stop = self._names[other], len(self._names[other]) * size
            shared = known // size
            while shared < min(len(names), len(theirs)) and names[shared] == theirs[shared]:
                span = range(shared * size, (shared + 1) * size)
                if not needed_taps(job, span) <= given(other, span, stop):
                    break
                shared += 1
            if 2 * (min(shared * size, most_known(job)) - known) >= len(job.prompt_ids) - known:
                return True
        return False

    def turn_off(self, reason: str) -> None:
        """Disable the cache; its contents are dropped before the next jobs start."""
        self.state = PrefixCaching(False, reason)

    def clear(self) -> None:
        """Drop everything."""
        self.cache.clear()

    def make_room(self, room: CacheLimits) -> None:
        """Limit the cache to the memory that running jobs leave."""
        self._room = room if self.state.enabled else CacheLimits(0, 0)
        self.cache.trim(room=self._room)

    def lay_out(self, running: list[RunningJob], cache: Cache | None) -> Prefill:
        """Lay out the prompts of new jobs behind their cached tokens.

        Args:
            running: the jobs.
            cache: the cache to read them with if nothing is cached.
        """
        if not self.state.enabled:
            return Prefill.lay_out(running, cache)
        known = [self.known(one.job) for one in running]
        # All rows end at one column, that of the longest rest; the others read as many of their cached tokens again.
        rest = max(len(one.job.prompt_ids) - count for one, count in zip(running, known, strict=True))
        counts = [max(len(one.job.prompt_ids) - rest, 0) for one in running]
        prefill = Prefill.lay_out(running, cache)
        found = []
        for one, count, padding in zip(running, counts, prefill.padding, strict=True):
            blocks = self.cache.use(self._names[one.job][: -(-count // self.cache.size)])
            found.append((blocks, count, padding))
            self._resume(one, blocks, count)
            if most_known(one.job):
                self.hits += count
                self.misses += len(one.job.prompt_ids) - count
        if any(counts):
            assert self._layout is not None
            prefill.done = prefill.width - rest
            prefill.cache = self._layout.lay_out(found, prefill.done)
        return prefill

    def _resume(self, one: RunningJob, blocks: list[Block], count: int) -> None:
        """Give a job the cached rows of its first tokens, and capture the rows of the others for its blocks."""
        job, size = one.job, self.cache.size
        one.cached = count
        whole = len(self._names[job]) * size
        extra = filler_plan(job, whole)
        if extra is not None and len(extra.taps) * whole * self._row_bytes <= self._room.rows:
            one.filler = RequestRows(extra, len(job.prompt_ids), self._memory)
        if not count:
            return
        starts = range(0, count, size)
        if one.rows is not None and one.rows.plan.positions.policy != "last":
            kept = [one.rows.kept(range(start, min(start + size, count))) for start in starts]
            parts = zip(kept, starts, blocks, strict=True)
            one.rows.resume([KnownRows(part, start, block.rows) for part, start, block in parts])
        if one.probed is not None:
            taps = {scorer.tap for scorer in job.probes}
            rows = {tap: torch.cat([block.rows[tap] for block in blocks])[:count] for tap in taps}
            one.probed.resume(count, rows)

    def keep_prompts(self, prefill: Prefill) -> None:
        """Cache the blocks of a prefill's prompts, now that all of them are read."""
        if not self.state.enabled:
            return
        for row, one in enumerate(prefill.running):
            names = self._names[one.job]
            begins = [number * self.cache.size for number in range(len(names) + 1)]
            self._keep(one, names, begins, one.cached, prefill.cache.layers, row, prefill.padding[row])
            one.filler = None

    def keep_completion(self, one: RunningJob, rows: BatchRows, row: int) -> None:
        """Cache the blocks that a job's completion adds, now that it has ended and is still in its slot."""
        if not self.state.enabled or self._exact or not isinstance(rows, SlotRows):
            return
        tokens, size = one.processed_ids, self.cache.size
        known = self._names[one.job]
        names = name_blocks(one.job, tokens, size, known)
        begins = [number * size for number in range(len(names) + 1)]
        self._keep(one, names, begins, len(known) * size, rows.cache.layers, row, rows.start(row))

    def _keep(
        self,
        one: RunningJob,
        names: list[bytes],
        begins: list[int],
        first: int,
        layers: Sequence[CacheLayerMixin],
        row: int,
        padding: int,
    ) -> None:
        """Add a sequence's blocks from position `first` on to the cache."""
        layout = self._layout = self._layout or KeyValues(layers)
        sources = [rows for rows in (one.rows, one.filler) if rows is not None]
        taps = {tap for rows in sources for tap in rows.plan.taps.values()}
        for name, (start, stop) in zip(names, pairwise(begins), strict=True):
            if start < first:
                continue
            lacking = self.cache.lacks(name, taps)
            wanted = taps if lacking is None else lacking
            found: dict[Tap, torch.Tensor] = {}
            for rows in sources:
                found |= rows.between(start, stop, wanted - found.keys()) if wanted else {}
            columns = slice(padding + start, padding + stop)
            self.cache.add(name, partial(layout.cut, layers, row, columns), found)
        self.cache.trim(names)
