"""The Serve application: an ingress in front of model replicas. `serve run serve_app.app:build model=smollm2-135m`.

`max_ongoing_requests` of the replica is far above the engine's width on purpose: the engine has the bounded queue, which
knows what fits, and health checks must get through while it is full.

The application is deployed again to load another model. Serve would take that for new code and restart everything, so both
deployments carry a version that is made once and stays; what differs then is the model's `user_config` only.
"""

from functools import partial

import ray
from ray import serve
from ray.serve import Application, Deployment
from ulid import ULID

from serve_app.config import ModelChoice, ServerConfig
from serve_app.ingress import Ingress
from serve_app.replica import ModelReplica

# The server writes a line for every request itself (`middleware`), with what Serve does not know.
QUIET = {"enable_access_log": False}


def build(config: ServerConfig) -> Application:
    """Build the application from its configuration."""
    return _application(config, str(ULID()), config.choice)


def _application(config: ServerConfig, version: str, choice: ModelChoice) -> Application:
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2000,
        logging_config=QUIET,
    )
    model = serve.deployment(
        ModelReplica,
        name="model",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": _gpus(config)},
        max_ongoing_requests=2000,
        graceful_shutdown_timeout_s=10,
        health_check_period_s=3,  # a replica whose engine has given up fails three checks before Serve restarts it
        user_config=choice.model_dump(mode="json"),
        logging_config=QUIET,
    )
    replicas = _pinned(model, version).bind(config)
    return _pinned(ingress, version).bind(replicas, config, partial(_redeploy, config, version))


def _pinned(deployment: Deployment, version: str) -> Deployment:
    # Since Ray 2.60 only Serve itself gives versions; every imperative deployment gets a random one otherwise.
    return deployment.options(version=version, _internal=True)


def _redeploy(config: ServerConfig, version: str, choice: ModelChoice) -> None:
    """Deploy the application that this replica is part of again, with another choice of model."""
    serve.run(_application(config, version, choice), name=serve.get_replica_context().app_name)


def _gpus(config: ServerConfig) -> float:
    """Return the GPUs a replica reserves: as configured, else one if it may use one and the cluster has one."""
    if config.num_gpus or config.device == "cpu":
        return config.num_gpus
    return 1 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0
