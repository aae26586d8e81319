"""Rewrites cluster.yaml for one launch: memory, price and the like are no flags of SkyPilot's, so they go into the file."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.config import Dtype, EngineName

Sync = Literal["full", "frozen", "fresh", "skip"]


class ClusterSettings(BaseModel):
    """What a cluster is to be; the options of `roentgen up` and `roentgen eval --launch`.

    Attributes:
        model: to serve.
        revision: of a hub model; the newest if absent.
        dtype: of weights and activations; "auto" takes bfloat16 where the GPU computes in it.
        engine: "vllm" has the nodes install it; absent, what serve.yaml says, else transformers on a new cluster.
        min_vram: gigabytes of memory that a GPU must have; 0 for machines without one.
        gpus: per node.
        max_price: dollars per hour and node.
        port: the server's, on the cluster and at this end of the tunnel.
        name: of the cluster.
        cluster: a running cluster to use, by name; nothing is provisioned.
        reuse: use a running cluster called `name`, if there is one.
        sync: what is installed on a cluster that runs: resolved anew (full), exactly the pins (frozen), from nothing
            (fresh), or nothing, without syncing the code either (skip).
        nodes: of the cluster.
        spot: whether the provider may take the machines back, at a lower price.
        infra: where, in SkyPilot's words: aws, aws/us-east-1, …; anywhere if absent.
        store: s3://BUCKET/FOLDER, or a folder on the nodes.
        max_replicas: copies of the model that Serve may start under load; 0 for a fixed number, one per GPU.
        open_port: open the port to the Internet, behind an API key, instead of only to a tunnel.
        idle_minutes: after which the cluster takes itself down.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "Qwen/Qwen3-0.6B"
    revision: str | None = None
    dtype: Dtype = "auto"
    engine: EngineName | None = None
    min_vram: int = Field(default=16, ge=0)
    gpus: int = Field(default=1, ge=1)
    max_price: float = Field(default=0.60, gt=0)
    port: int = Field(default=8000, ge=1024, le=65535)
    name: str = Field(default="roentgen", pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)
    cluster: str | None = None
    reuse: bool = False
    sync: Sync = "full"
    nodes: int = Field(default=1, ge=1)
    spot: bool = False
    infra: str | None = None
    store: str = ""
    max_replicas: int = Field(default=0, ge=0)
    open_port: bool = False
    idle_minutes: int = Field(default=15, ge=1)

    @model_validator(mode="after")
    def _several_nodes_share_a_store(self) -> Self:
        if self.nodes > 1 and not self.store:
            raise ValueError(
                f"--nodes {self.nodes} needs a store that every node can write: --store s3://BUCKET/FOLDER (or a folder that "
                "cluster.yaml mounts on all of them)"
            )
        return self

    @property
    def wanted(self) -> str:
        """The name of the cluster that is meant, running or not."""
        return self.cluster or self.name


def rewrite(task: dict[str, Any], settings: ClusterSettings, *, exists: bool = False) -> dict[str, Any]:
    """Return cluster.yaml's content for a launch.

    Args:
        task: cluster.yaml's content.
        settings: of the launch.
        exists: whether the cluster exists: its machines are what they are, and SkyPilot would refuse to be asked for others.
    """
    resources: dict[str, Any] = {"autostop": {**task["resources"]["autostop"], "idle_minutes": settings.idle_minutes}}
    if not exists:
        resources |= _machine(settings)
    if settings.open_port:
        resources["ports"] = settings.port
    envs = {
        **task["envs"],
        "MODEL": settings.model,
        "REVISION": settings.revision or "",
        "DTYPE": settings.dtype,
        "ENGINE": settings.engine or "",
        "STORE": settings.store,
        "PORT": str(settings.port),
        "MAX_REPLICAS": str(settings.max_replicas or ""),
        "SYNC": settings.sync,
    }
    return {**task, "name": settings.wanted, "num_nodes": settings.nodes, "resources": resources, "envs": envs}


def _machine(settings: ClusterSettings) -> dict[str, Any]:
    machine: dict[str, Any] = {"max_hourly_cost": settings.max_price}
    if settings.min_vram:
        machine["accelerators"] = f"{settings.min_vram}GB+:{settings.gpus}"
    else:
        machine |= {"cpus": "4+", "memory": "16+"}
    if settings.spot:
        machine["use_spot"] = True
    if settings.infra:
        machine["infra"] = settings.infra
    return machine


def write(source: Path, target: Path, settings: ClusterSettings, *, exists: bool = False) -> None:
    """Rewrite a task file for a launch; its folder stays the one that is synced."""
    task = rewrite(yaml.safe_load(source.read_text()), settings, exists=exists)
    if task.get("workdir") == ".":
        task["workdir"] = str(source.parent.absolute())
    if settings.sync == "skip":
        del task["workdir"]
        del task["setup"]
        task["run"] = f"cd ~/sky_workdir && {task['run']}"
    target.write_text(yaml.safe_dump(task, sort_keys=False))
