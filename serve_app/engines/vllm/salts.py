"""Computes salts for vLLM's prefix cache: requests with the same salt may share cached tokens.

vLLM names a cached block by its tokens and by the salt of its request. A salt here contains everything that keys, values and
needed rows depend on besides the tokens: the client's own salt, the steering vectors, and the hook points whose prompt rows
are needed. So cached tokens were computed for a request that kept the same rows. A request that needs no prompt row except the
last token's, which is always computed, shares with all requests that capture nothing.

If rows of cached tokens have been dropped in the worker, the requests that need the same rows start to fill the cache anew,
under a salt of the next generation.
"""

from hashlib import blake2b

from serve_app.engines.prefix_blocks import needed_taps
from serve_app.engines.protocol import GenerationJob

ANYWHERE = ("all", "stride")
"""Position policies of steering that do not depend on where the prompt ends."""


class Salts:
    """The salts of one engine's requests."""

    def __init__(self) -> None:
        """Start with the first generation of each salt."""
        self._generations: dict[str, int] = {}

    def of(self, job: GenerationJob) -> str | None:
        """Return a job's salt; None shares with all jobs that have none."""
        kind = _kind(job)
        generation = self._generations.get(kind, 0)
        return (f"{kind}.{generation}" if generation else kind) or None

    def renew(self, job: GenerationJob, salt: str | None) -> None:
        """Move jobs with the same needs to the next generation, so that they find nothing cached under the earlier salt."""
        if self.of(job) == salt:
            kind = _kind(job)
            self._generations[kind] = self._generations.get(kind, 0) + 1


def rows_needed(job: GenerationJob) -> bool:
    """Whether a job needs rows of its prompt before the last token."""
    return bool(needed_taps(job, range(len(job.prompt_ids) - 1)))


def _kind(job: GenerationJob) -> str:
    """Return a digest of what a job's cached tokens must have in common with its own; "" if that is nothing."""
    parts: list[object] = []
    if job.cache_salt is not None:
        parts.append(("salt", job.cache_salt))
    if taps := needed_taps(job, range(len(job.prompt_ids) - 1)):
        parts.append(("rows", sorted(map(repr, taps))))
    for steering_vector in job.steering:
        positions = steering_vector.positions
        until = None if positions.policy in ANYWHERE else len(job.prompt_ids)
        vector = blake2b(steering_vector.vector.cpu().float().numpy().tobytes(), digest_size=16).hexdigest()
        parts.append(("steering", repr(steering_vector.tap), str(positions), until, vector))
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest() if parts else ""
