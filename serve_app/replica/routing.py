"""Which replica a request goes to: of two that have a model, the one with less to do.

Serve's own choice goes by the length of replicas' queues alone, and a replica that is still loading has the shortest: after
one has been lost, most requests would meet its successor, which can only refuse them. So replicas tell Serve whether they are
ready (`ModelReplica.record_routing_stats`), and only if none is does a request go to another.

Serve knows how long a replica's queue is from what it has sent there; of a burst, it would choose for many requests before it
has sent the first, so that all go to the replica that was the shortest, and past its limit. So a choice waits here until what
was chosen before it has been sent.
"""

import asyncio
import random
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

PERIOD_S = 1.0
"""How often Serve asks a replica whether it is ready."""


class ReadyReplicas(FIFOMixin, RequestRouter):
    """The power of two choices among the replicas that are ready."""

    def initialize_state(self, **_: Any) -> None:
        """Make what Serve's tasks, each of which chooses for one request after the other, take turns with."""
        self._turn = asyncio.Lock()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Pick two at random; Serve takes the one with the shorter queue, and asks again if both are full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        async with self._turn:
            await asyncio.sleep(0)  # what the turn before has chosen is sent now
        ready = [replica for replica in candidate_replicas if replica.routing_stats.get("ready")] or candidate_replicas
        return [random.sample(ready, min(2, len(ready)))] if ready else []
