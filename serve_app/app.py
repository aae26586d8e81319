"""The Serve application: an ingress in front of model replicas. `serve run serve_app.app:build model=smollm2-135m`.

The engine has the queue that counts: it is bounded and knows what fits. Serve lets through what the engine can hold and some
more, so that the engine itself refuses what is too much and questions are answered while it is full; behind that, Serve's own
bounded queue only ever fills if replicas do not answer at all. It is as long again, because Serve counts requests that arrive
together as queued, even if they will not have to wait.

The application is deployed again to load another model. Serve would take that for new code and restart everything, so both
deployments carry a version that is made once and stays; what differs then is the model's `user_config` only.
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
from serve_app.replica.model_replica import ASKED, ModelReplica
from serve_app.replica.routing import PERIOD_S, ReadyReplicas

log = logging.getLogger(__name__)

# The server writes a line for every request itself (`middleware`), with what Serve does not know.
QUIET = {"enable_access_log": False}

BESIDE = 64
"""Requests for a replica beside those that the engine holds: refused ones, questions of how it is, texts to tokenize."""


class _Logged:
    """What runs in an actor of its own, whose logs are for machines."""

    def __init__(self, *args: Any) -> None:
        write_json_logs()
        super().__init__(*args)


class _LoggedIngress(_Logged, Ingress):
    """The ingress, in an actor."""


class _LoggedReplica(_Logged, ModelReplica):
    """A replica, in an actor."""


def build(config: ServerConfig) -> Application:
    """Build the application from its configuration."""
    check("ray")
    version = str(ULID())
    return _application(config, version, config.choice, version)


def _application(config: ServerConfig, version: str, choice: ModelChoice, asked: str) -> Application:
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
        health_check_period_s=3,  # a replica whose engine has given up fails three checks before Serve restarts it
        # Serve tells replicas what has changed only: the same choice again, of a folder that has changed, is another.
        user_config={**choice.model_dump(mode="json"), ASKED: asked},
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
    """Return how many requests Serve passes on to a replica at a time."""
    return config.max_batch + config.max_queue + BESIDE


def _scale(config: ServerConfig) -> dict[str, Any]:
    """Return how many replicas of the model there are: so many, or as many as it takes for each to have one full batch."""
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
    """Return what a replica reserves, and where.

    A model that is split over several GPUs needs them on one node: its replica and vLLM's processes, which see what it sees,
    share one bundle of a placement group. Serve counts no replicas per node then; the GPUs do.
    """
    gpus = config.tensor_parallel_size
    if gpus > 1 and config.device != "cpu":
        here = [node["Resources"].get("GPU", 0) for node in ray.nodes()] if ray.is_initialized() else []
        if here and (most := max(here)) < gpus:
            log.warning(
                "tensor_parallel_size: a replica waits for a node with %d GPUs; here none has over %d", gpus, most
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
    # Since Ray 2.60 only Serve itself gives versions; every imperative deployment gets a random one otherwise.
    return deployment.options(version=version, _internal=True)


def _redeploy(config: ServerConfig, version: str, choice: ModelChoice) -> None:
    """Deploy the application that this replica is part of again, with another choice of model."""
    serve.run(_application(config, version, choice, str(ULID())), name=serve.get_replica_context().app_name)


def _gpus(config: ServerConfig) -> float:
    """Return the GPUs a replica reserves: as configured, else one if it may use one and the cluster has one."""
    if config.num_gpus or config.device == "cpu":
        return config.num_gpus
    return 1 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0
