"""The Serve application: an ingress in front of model replicas. `serve run serve_app.app:build model=smollm2-135m`.

`max_ongoing_requests` of the replica is far above the engine's width on purpose: the engine has the bounded queue, which
knows what fits, and health checks must get through while it is full.
"""

import ray
from ray import serve
from ray.serve import Application

from serve_app.config import ServerConfig
from serve_app.ingress import Ingress
from serve_app.replica import ModelReplica


def build(config: ServerConfig) -> Application:
    """Build the application from its configuration."""
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2000,
    )
    model = serve.deployment(
        ModelReplica,
        name="model",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": _gpus(config)},
        max_ongoing_requests=2000,
        graceful_shutdown_timeout_s=10,
    )
    return ingress.bind(model.bind(config), config)


def _gpus(config: ServerConfig) -> float:
    """Return the GPUs a replica reserves: as configured, else one if it may use one and the cluster has one."""
    if config.num_gpus or config.device == "cpu":
        return config.num_gpus
    return 1 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0
