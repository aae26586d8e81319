"""Rewrites cluster.yaml for one launch. SkyPilot has no flags for memory, price and similar settings; they go into the file."""

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from roentgen.contract import Dtype, Revision
from roentgen.defaults import CLUSTER_MODEL, CLUSTER_NAME, CLUSTER_PORT
from serve_app.config import EngineName


class ClusterSettings(BaseModel):
    """The settings of a cluster: the options of `roentgen up` and `roentgen eval --launch` (`roentgen.options`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(CLUSTER_MODEL, description="The model to serve.")
    revision: Revision = None
    dtype: Dtype = Field(
        "auto",
        description="Data type of weights and activations; auto is bfloat16 if the GPU supports it, else float32.",
    )
    engine: EngineName | None = Field(
        None,
        description="Inference engine; the nodes install vLLM if it is vllm. Default: the one in serve.yaml, else "
        "transformers.",
    )
    taps: str = Field(
        "",
        description="vLLM engine only: the hook points that requests may name (see `roentgen serve --taps`). Default: the "
        "ones in serve.yaml.",
    )
    min_vram: int = Field(16, ge=0, description="Minimum GPU memory in GB; 0 for no GPU.")
    gpus: int = Field(1, ge=1, description="GPUs per node.")
    max_price: float = Field(0.60, gt=0, description="Maximum price in dollars per node and hour.")
    port: int = Field(
        CLUSTER_PORT,
        ge=1024,
        le=65535,
        description="Port of the server, on the cluster and on this machine (through the tunnel).",
    )
    name: str = Field(
        CLUSTER_NAME, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40, description="Name of a new cluster."
    )
    cluster: str | None = Field(
        None, description="Use this running cluster.", json_schema_extra={"flags": ["--cluster", "--gpu-id"]}
    )
    reuse: bool = Field(False, description="Use the running cluster named --name, if there is one.")
    skip_sync: bool = Field(False, description="Do not sync or install anything on a running cluster.")
    frozen_sync: bool = Field(False, description="Install exactly the pinned versions.")
    fresh: bool = Field(False, description="Reinstall everything on a running cluster.")
    nodes: int = Field(1, ge=1, description="Number of nodes.")
    max_replicas: int = Field(
        0, ge=0, description="Maximum number of replicas under load; 0 for a fixed number, one per GPU."
    )
    spot: bool = Field(False, description="Use spot instances: cheaper, but the provider may reclaim them.")
    infra: str | None = Field(
        None, description="Cloud and region in SkyPilot's notation: aws, aws/us-east-1, …; any by default."
    )
    store: str = Field("", description="Activation store: s3://BUCKET/FOLDER, or a folder on the nodes.")
    open_port: bool = Field(False, description="Open the port to the Internet; the server requires an API key.")
    idle_minutes: int = Field(15, ge=1, description="Minutes after which an idle cluster terminates itself.")

    @model_validator(mode="after")
    def _one_way_to_install(self) -> Self:
        if self.skip_sync + self.frozen_sync + self.fresh > 1:
            raise ValueError("--skip-sync, --frozen-sync and --fresh are mutually exclusive; give one of them")
        return self

    @model_validator(mode="after")
    def _several_nodes_share_a_store(self) -> Self:
        if self.nodes > 1 and not self.store:
            raise ValueError(
                f"--nodes {self.nodes} needs a store that every node can write to: --store s3://BUCKET/FOLDER, or a folder "
                "that cluster.yaml mounts on all nodes"
            )
        return self

    @property
    def sync(self) -> str:
        """How the nodes install the code: "full", "frozen" (pinned versions), "fresh" (from nothing) or "skip" (not at all)."""
        return "skip" if self.skip_sync else "frozen" if self.frozen_sync else "fresh" if self.fresh else "full"

    @property
    def wanted(self) -> str:
        """The name of the cluster to use, whether it runs or not."""
        return self.cluster or self.name


def rewrite(task: dict[str, Any], settings: ClusterSettings, *, exists: bool = False) -> dict[str, Any]:
    """Return cluster.yaml's content for a launch.

    Args:
        task: cluster.yaml's content.
        settings: the launch's settings.
        exists: whether the cluster exists. If so, no machine is requested, because SkyPilot refuses a different one.
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
        "TAPS": settings.taps,
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
    """Rewrite a task file for a launch. The folder of the source file is the one that is synced."""
    task = rewrite(yaml.safe_load(source.read_text()), settings, exists=exists)
    if task.get("workdir") == ".":
        task["workdir"] = str(source.parent.absolute())
    if settings.skip_sync:
        del task["workdir"]
        del task["setup"]
        task["run"] = f"cd ~/sky_workdir && {task['run']}"
    target.write_text(yaml.safe_dump(task, sort_keys=False))
