"""Which replica a request goes to: of two that have a model, the one with less to do.

Serve's own choice goes by the length of replicas' queues alone, and a replica that is still loading has the shortest: after
one has been lost, most requests would meet its successor, which can only refuse them. So replicas tell Serve whether they are
ready (`ModelReplica.record_routing_stats`), and only if none is does a request go to another.
"""

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

PERIOD_S = 1.0
"""How often Serve asks a replica whether it is ready."""


class ReadyReplicas(FIFOMixin, RequestRouter):
    """The power of two choices among the replicas that are ready."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Pick two at random; Serve takes the one with the shorter queue, and asks again if both are full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        ready = [replica for replica in candidate_replicas if replica.routing_stats.get("ready")] or candidate_replicas
        return [random.sample(ready, min(2, len(ready)))] if ready else []
