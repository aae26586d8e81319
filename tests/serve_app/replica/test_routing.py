"""Serve's own router with our choice in it: replicas are stand-ins that are never done, everything else is Serve's."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from serve_app.replica.routing import ReadyReplicas

DEPLOYMENT = DeploymentID("model", "roentgen")
MOST = 10


@dataclass
class Replica:
    """What the router sees of a replica."""

    name: str
    routing_stats: dict[str, Any] = field(default_factory=lambda: {"ready": True})
    max_ongoing_requests: int = MOST
    queue: int = 0

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.name, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue


async def burst(replicas: list[Replica], requests: int) -> Counter[str]:
    """Send requests at once that are never done; returns how many went to which replica."""
    router = ReadyReplicas(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        self_node_id="node",
        self_actor_id="actor",
        self_actor_handle=None,
        use_replica_queue_len_cache=True,
        create_replica_wrapper_func=lambda replica: replica,
    )
    router.initialize_state()
    router.update_replicas(replicas)
    await asyncio.sleep(0.01)  # they have been asked how long their queues are
    by_id = {replica.replica_id: replica for replica in replicas}
    sent: Counter[str] = Counter()

    async def send(number: int) -> None:
        metadata = RequestMetadata(request_id=str(number), internal_request_id=str(number), call_method="generate")
        chosen = await router._choose_replica_for_request(PendingRequest(args=[], kwargs={}, metadata=metadata))
        router.on_send_request(chosen.replica_id)
        by_id[chosen.replica_id].queue += 1
        sent[by_id[chosen.replica_id].name] += 1

    sending = [asyncio.create_task(send(number)) for number in range(requests)]
    await asyncio.wait(sending, timeout=0.5)
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, return_exceptions=True)
    return sent


def test_a_burst_does_not_pass_a_replicas_limit() -> None:
    assert asyncio.run(burst([Replica("a")], 8 * MOST)) == {"a": MOST}


def test_a_burst_is_spread_by_what_has_been_sent() -> None:
    sent = asyncio.run(burst([Replica("a", queue=4), Replica("b")], MOST))
    assert sent == {"a": 3, "b": 7}


@pytest.mark.parametrize(("ready", "expected"), [(True, {"b"}), (False, {"a", "b"})])
def test_a_replica_that_is_not_ready_has_none_unless_all_are_not(ready: bool, expected: set[str]) -> None:
    replicas = [Replica("a", {"ready": False}), Replica("b", {"ready": ready})]
    assert asyncio.run(burst(replicas, MOST)).keys() == expected
