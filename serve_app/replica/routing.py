"""Routes a request to a replica: the less loaded of two ready replicas.

Serve's own router compares only queue lengths, and a loading replica has the shortest queue. After a replica is lost, most
requests would go to its successor, which can only refuse them. So replicas report whether they are ready
(`ModelReplica.record_routing_stats`), and a request goes to another replica only if none is ready.

Serve learns a replica's queue length from the requests it has sent. In a burst it would choose a replica for many requests
before it has sent the first, so that all of them go to the same replica, beyond its limit. So each choice waits here until
the previous request has been sent.
"""

import asyncio
import random
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

PERIOD_S = 1.0
"""Seconds between Serve's requests for a replica's readiness."""


class ReadyReplicas(FIFOMixin, RequestRouter):
    """Power-of-two-choices routing among the ready replicas."""

    def initialize_state(self, **_: Any) -> None:
        """Create the lock that serializes the choices of Serve's routing tasks."""
        self._turn = asyncio.Lock()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Pick two ready replicas at random; Serve takes the one with the shorter queue, and retries if both are full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        async with self._turn:
            await asyncio.sleep(0)  # let the previous request be sent
        ready = [replica for replica in candidate_replicas if replica.routing_stats.get("ready")] or candidate_replicas
        return [random.sample(ready, min(2, len(ready)))] if ready else []
