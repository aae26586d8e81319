"""The Serve application: an ingress in front of model replicas. `serve run serve_app.app:build model=smollm2-135m`.

The engine's own queue is bounded and decides which requests are refused. Serve's limit of ongoing requests per replica
(`most_per_replica`) is higher than what the engine accepts, so that a full engine still answers status requests and refuses
the rest itself. Serve's own queue fills only if replicas do not answer at all. It has the same length again, because Serve
counts requests that arrive together as queued even if they need not wait.

To load another model, the application is deployed again. Serve would treat that as new code and restart every replica, so
both deployments keep a fixed version, and only the model's `user_config` changes.
"""

import logging
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig
from ulid import ULID

from roentgen.compat import check
from serve_app.config import ModelChoice, ServerConfig
from serve_app.http.ingress import Ingress
from serve_app.http.run_registry import TurnCounter
from serve_app.logs import write_json_logs
from serve_app.replica.model_replica import LOAD_ID, ModelReplica
from serve_app.replica.routing import PERIOD_S, ReadyReplicas

log = logging.getLogger(__name__)

# The server logs every request itself (`middleware`), with fields that Serve does not know.
QUIET = {"enable_access_log": False}

BESIDE = 64
"""Requests that a replica accepts in addition to those the engine holds: status, tokenization, and refused requests."""


class _Logged:
    """Makes an actor's process write JSON logs."""

    def __init__(self, *args: Any) -> None:
        write_json_logs()
        super().__init__(*args)


class _LoggedIngress(_Logged, Ingress):
    """The ingress as an actor."""


class _LoggedReplica(_Logged, ModelReplica):
    """A replica as an actor."""


def build(config: ServerConfig) -> Application:
    """Build the application from its configuration."""
    check("ray")
    version = str(ULID())
    return _application(config, version, config.choice, version)


def _application(config: ServerConfig, version: str, choice: ModelChoice, load_id: str) -> Application:
    most = most_per_replica(config)
    ingress = serve.deployment(
        serve.ingress()(_LoggedIngress),
        name="ingress",
        num_replicas=config.num_ingresses,
        max_replicas_per_node=1 if config.num_ingresses > 1 else None,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2000,
        logging_config=QUIET,
    )
    model = serve.deployment(
        _LoggedReplica,
        name="model",
        **_scale(config),
        **_place(config),
        max_ongoing_requests=most,
        max_queued_requests=most,
        request_router_config=RequestRouterConfig(
            request_router_class=ReadyReplicas, request_routing_stats_period_s=PERIOD_S
        ),
        graceful_shutdown_timeout_s=10,
        health_check_period_s=3,  # Serve restarts a replica after three failed checks
        # Serve reconfigures replicas only if this changes; a new id makes it reload the same choice from a changed folder.
        user_config={**choice.model_dump(mode="json"), LOAD_ID: load_id},
        logging_config=QUIET,
    )
    replicas = _pinned(model, version).bind(config)
    other = partial(_redeploy, config, version)
    if config.num_ingresses == 1:
        return _pinned(ingress, version).bind(replicas, config, other)
    numbers = serve.deployment(
        TurnCounter, name="numbers", num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=2000,
        logging_config=QUIET,
    )  # fmt: skip
    return _pinned(ingress, version).bind(replicas, config, other, _pinned(numbers, version).bind(config.store))


def most_per_replica(config: ServerConfig) -> int:
    """Return how many ongoing requests Serve allows per replica."""
    return config.max_batch + config.max_queue + BESIDE


def _scale(config: ServerConfig) -> dict[str, Any]:
    """Return the options for the number of replicas: fixed, or scaled so that each has one full batch."""
    if config.max_replicas <= config.num_replicas:
        return {"num_replicas": config.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.num_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.max_batch,
        }
    }


def _place(config: ServerConfig) -> dict[str, Any]:
    """Return the resources that a replica reserves, and their placement.

    A model that is split over several GPUs needs them on one node, so the replica and its vLLM worker processes share one
    bundle of a placement group. `max_replicas_per_node` is not set then: the number of GPUs limits the replicas.
    """
    gpus = config.tensor_parallel_size
    if gpus > 1 and config.device != "cpu":
        here = [node["Resources"].get("GPU", 0) for node in ray.nodes()] if ray.is_initialized() else []
        if here and (most := max(here)) < gpus:
            log.warning(
                "tensor_parallel_size: a replica waits for a node with %d GPUs; no node has more than %d", gpus, most
            )
        return {
            "ray_actor_options": {"num_cpus": 1, "num_gpus": gpus},
            "placement_group_bundles": [{"CPU": 1, "GPU": gpus}],
            "placement_group_strategy": "STRICT_PACK",
        }
    return {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": _gpus(config)},
        "max_replicas_per_node": config.max_replicas_per_node or None,
    }


def _pinned(deployment: Deployment, version: str) -> Deployment:
    # Since Ray 2.60, `version` is an internal option; without it every imperative deployment gets a random version.
    return deployment.options(version=version, _internal=True)


def _redeploy(config: ServerConfig, version: str, choice: ModelChoice) -> None:
    """Deploy this replica's application again, with another choice of model."""
    serve.run(_application(config, version, choice, str(ULID())), name=serve.get_replica_context().app_name)


def _gpus(config: ServerConfig) -> float:
    """Return the number of GPUs that a replica reserves: the configured one, else one if the cluster has GPUs."""
    if config.num_gpus or config.device == "cpu":
        return config.num_gpus
    return 1 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0
