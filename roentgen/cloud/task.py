"""Rewrites cluster.yaml for one launch: memory, price and the like are no flags of SkyPilot's, so they go into the file."""

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from roentgen.contract import Dtype, Revision
from roentgen.defaults import CLUSTER_MODEL, CLUSTER_NAME, CLUSTER_PORT
from serve_app.config import EngineName


class ClusterSettings(BaseModel):
    """What a cluster is to be; the options of `roentgen up` and `roentgen eval --launch` (`roentgen.options`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(CLUSTER_MODEL, description="The model to serve.")
    revision: Revision = None
    dtype: Dtype = Field(
        "auto",
        description="Precision of weights and activations; auto is bfloat16 where the GPU computes in it, else float32.",
    )
    engine: EngineName | None = Field(
        None,
        description="vllm has the nodes install it; if absent, what serve.yaml says, else transformers on a new cluster.",
    )
    taps: str = Field(
        "",
        description="With vLLM: the hook points that requests may name (roentgen serve --taps); empty is what serve.yaml says, "
        "else default.",
    )
    min_vram: int = Field(16, ge=0, description="GB of memory that a GPU must have; 0 for no GPU.")
    gpus: int = Field(1, ge=1, description="GPUs per node.")
    max_price: float = Field(0.60, gt=0, description="Dollars per hour and node.")
    port: int = Field(
        CLUSTER_PORT, ge=1024, le=65535, description="Port of the server, on the cluster and at this end of the tunnel."
    )
    name: str = Field(
        CLUSTER_NAME, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40, description="Name of a new cluster."
    )
    cluster: str | None = Field(
        None, description="Use exactly this running cluster.", json_schema_extra={"flags": ["--cluster", "--gpu-id"]}
    )
    reuse: bool = Field(False, description="Use the running cluster called --name, if there is one.")
    skip_sync: bool = Field(False, description="On a cluster that runs: sync and install nothing.")
    frozen_sync: bool = Field(False, description="Install exactly the pinned versions.")
    fresh: bool = Field(False, description="On a cluster that runs: install again from nothing.")
    nodes: int = Field(1, ge=1, description="Nodes of the cluster.")
    max_replicas: int = Field(0, ge=0, description="Copies of the model under load; 0 for a fixed number, one per GPU.")
    spot: bool = Field(False, description="Cheaper machines that the provider may take back.")
    infra: str | None = Field(
        None, description="Where, as SkyPilot writes it: aws, aws/us-east-1, …; anywhere if absent."
    )
    store: str = Field("", description="s3://BUCKET/FOLDER, or a folder on the nodes.")
    open_port: bool = Field(False, description="Open the port to the Internet, behind a key.")
    idle_minutes: int = Field(15, ge=1, description="Minutes until an idle cluster takes itself down.")

    @model_validator(mode="after")
    def _one_way_to_install(self) -> Self:
        if self.skip_sync + self.frozen_sync + self.fresh > 1:
            raise ValueError("--skip-sync, --frozen-sync and --fresh exclude one another")
        return self

    @model_validator(mode="after")
    def _several_nodes_share_a_store(self) -> Self:
        if self.nodes > 1 and not self.store:
            raise ValueError(
                f"--nodes {self.nodes} needs a store that every node can write: --store s3://BUCKET/FOLDER (or a folder that "
                "cluster.yaml mounts on all of them)"
            )
        return self

    @property
    def sync(self) -> str:
        """What is installed: all anew, exactly the pins, all from nothing, or nothing, without the code either."""
        return "skip" if self.skip_sync else "frozen" if self.frozen_sync else "fresh" if self.fresh else "full"

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
    """Rewrite a task file for a launch; its folder stays the one that is synced."""
    task = rewrite(yaml.safe_load(source.read_text()), settings, exists=exists)
    if task.get("workdir") == ".":
        task["workdir"] = str(source.parent.absolute())
    if settings.skip_sync:
        del task["workdir"]
        del task["setup"]
        task["run"] = f"cd ~/sky_workdir && {task['run']}"
    target.write_text(yaml.safe_dump(task, sort_keys=False))
