"""`roentgen up`: brings up a cluster that serves a model, and checks it.

It uses the first of these clusters that applies: the one given by `cluster`, which must run; with `reuse`, the one called
`name`, which is restarted if it is stopped; a new one. A new cluster never has the name of an existing one, since SkyPilot
would silently use that.

cluster.yaml is rewritten for the launch and passed to `sky launch`, which provisions, syncs, installs and runs the start
script. If nothing must be synced, `sky exec` only runs the start script. Keys are generated here and passed to the nodes as
SkyPilot secrets (through the environment, never on a command line). The nodes keep them; they are read back over ssh and never
printed. A cluster keeps its keys and its store, because a node that replaces a lost one needs those of the others. A bucket's
keys and address are passed in the same way, if this machine's environment has them.
"""

import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from roentgen.api_keys import VARIABLE, client_key
from roentgen.cloud.remote import Head
from roentgen.cloud.skypilot import JOB_FAILED, ROOT, Cluster, SkyPilot
from roentgen.cloud.task import ClusterSettings, write
from roentgen.defaults import DASHBOARD_PORT, HOST
from roentgen.serving.local_server import LaunchError
from roentgen.serving.smoke import smoke

TASK = ROOT / "cluster.yaml"
MADE_HERE = ("RAY_AUTH_TOKEN", VARIABLE)
BUCKET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
BUCKET_ADDRESS = {"AWS_ENDPOINT_URL": "AWS_ENDPOINT_URL_S3", "AWS_REGION": "AWS_DEFAULT_REGION"}
"""Variables on the nodes, and their other names here: AWS_ENDPOINT_URL would redirect SkyPilot's own requests, too."""


@dataclass(frozen=True)
class Launched:
    """A cluster that serves a model."""

    name: str
    """The cluster's name."""
    created: bool
    """Whether this launch provisioned it, and so may take it down."""
    port: int
    """The server's port."""

    @property
    def next_commands(self) -> list[str]:
        """Commands to run next."""
        ray = DASHBOARD_PORT
        return [
            f"ssh -N -L {self.port}:localhost:{self.port} -L {ray}:localhost:{ray} {self.name}   # the server and Ray, here",
            f"ssh {self.name} cat .roentgen/env                                # its key (ROENTGEN_API_KEY) and Ray's token",
            f"roentgen eval --launch --cluster {self.name} --samples 200 --parallel 32 --collect-activations",
            f"roentgen doctor {self.name} --port {self.port}",
            f"roentgen cluster logs {self.name}",
            f"roentgen cluster down {self.name}",
        ]


def choose(settings: ClusterSettings, clusters: list[Cluster]) -> Cluster | None:
    """Return the cluster to use, None for a new one.

    Raises:
        LaunchError: if the given cluster does not run, or a new one would have the name of an existing one.
    """
    there = {cluster.name: cluster for cluster in clusters}
    found = there.get(settings.wanted)
    if settings.cluster is not None and (found is None or found.status != "UP"):
        running = ", ".join(name for name, one in there.items() if one.status == "UP") or "none"
        state = f"is {found.status}" if found else "does not exist"
        raise LaunchError(f"--cluster: {settings.cluster!r} {state}; running: {running}")
    if found is not None and settings.cluster is None and not settings.reuse:
        raise LaunchError(
            f"--name: a cluster {found.name!r} exists ({found.status}); use it with --reuse, or choose another --name"
        )
    if settings.skip_sync and (found is None or found.status != "UP"):
        raise LaunchError("--skip-sync: not possible on a new cluster, where nothing is installed; give a running one")
    return found


def kept_on(found: Cluster | None) -> dict[str, str]:
    """Return the keys and the store of an existing cluster, for its new nodes.

    Raises:
        LaunchError: if it runs but does not answer.
    """
    if found is None:
        return {}
    try:
        return Head(found.name).environment()
    except LaunchError:
        if found.status == "UP":
            raise
        return {}  # stopped, or without its head: Ray is gone, and the next one gets new keys


def given_to(
    settings: ClusterSettings, kept: Mapping[str, str], environment: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the secrets and the other variables that a launch passes to the nodes.

    Args:
        settings: the launch's settings.
        kept: variables that the cluster already has.
        environment: this machine's environment.
    """
    secret = {name: kept.get(name) or environment.get(name) or secrets.token_hex(32) for name in MADE_HERE}
    plain = {"STORE": settings.store}
    if not settings.store:
        plain = {name: kept.get(name, "") for name in ("STORE", *BUCKET_ADDRESS)}
    elif plain["STORE"].startswith("s3://"):
        plain |= {name: environment.get(other) or environment.get(name, "") for name, other in BUCKET_ADDRESS.items()}
    wanted = ("HF_TOKEN", *(BUCKET_KEYS if plain["STORE"].startswith("s3://") else ()))
    secret |= {name: environment.get(name, "") for name in wanted}
    return {name: text for name, text in secret.items() if text}, {name: text for name, text in plain.items() if text}


def up(
    settings: ClusterSettings,
    sky: SkyPilot,
    stage: Callable[[str], None],
    *,
    claim: Callable[[Launched], None] = lambda _: None,
    accept: Callable[[Launched], None] = lambda _: None,
    check: bool = True,
) -> Launched:
    """Bring up a cluster that serves a model.

    Args:
        settings: the cluster's settings.
        sky: SkyPilot.
        stage: called with each stage.
        claim: called with the cluster before anything is provisioned, so that it can be taken down whatever happens.
        accept: called with the cluster before `claim`; it may raise an error to refuse it.
        check: whether to check the server with `smoke`.

    Raises:
        LaunchError: if the cluster cannot be brought up; the message ends with the relevant log.
    """
    if not TASK.exists():
        raise LaunchError(
            "a launch copies the repository to the nodes, but this Roentgen was installed without it: install it from a clone "
            "(run `make install` there) and launch from the clone"
        )
    stage("asking SkyPilot which clusters run")
    found = choose(settings, sky.clusters(refresh=True))
    launched = Launched(settings.wanted, found is None, settings.port)
    accept(launched)
    claim(launched)
    stage(f"{'using' if found else 'provisioning'} {launched.name}")
    _launch(settings, sky, found, stage)
    if check:
        smoke_on(launched, settings.model, stage)
    return launched


def smoke_on(launched: Launched, model: str, stage: Callable[[str], None]) -> None:
    """Check the server on its own node, and through a tunnel; a failure through the tunnel is only reported.

    Raises:
        LaunchError: if the check on the node fails; the message ends with the log.
    """
    head = Head(launched.name)
    stage("smoke test on the head node")
    try:
        arguments = ("roentgen", "smoke", f"http://{HOST}:{launched.port}", "--model", model)
        for line in head.run(head.in_project(*arguments), timeout=900).splitlines():
            stage(line)
    except LaunchError as error:
        raise LaunchError(f"the smoke test failed: {error}\n{head.tail()}") from error
    key = client_key(head.environment().get(VARIABLE, ""))
    try:
        with head.tunnel(launched.port, replace=True) as base:
            smoke(base, key, stage)
        stage("also reached through a tunnel")
    except LaunchError as error:
        stage(f"not reached from this machine (the cluster works): {error}")


def _launch(settings: ClusterSettings, sky: SkyPilot, found: Cluster | None, stage: Callable[[str], None]) -> None:
    name = settings.wanted
    secret, plain = given_to(settings, kept_on(found), os.environ)
    flags = [part for variable in secret for part in ("--secret", variable)]
    flags += [part for variable, text in plain.items() for part in ("--env", f"{variable}={text}")]
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "cluster.yaml"
        # A running cluster keeps its number of nodes.
        nodes = {"nodes": found.nodes} if found else {}
        write(TASK, task, settings.model_copy(update=nodes), exists=found is not None)
        if settings.skip_sync:
            command = ["exec", name, str(task), *flags]
        else:
            command = ["launch", "--yes", "--cluster", name, str(task), *flags]
        code, last = sky.stream(command, stage, secret)
        if code not in (0, JOB_FAILED) and found is not None:
            # After a node is lost, one launch repairs SkyPilot's own Ray, and the next one can use it.
            stage("retrying once")
            code, last = sky.stream(command, stage, secret)
    if code == JOB_FAILED:
        raise LaunchError(f"the start script failed on {name}:\n" + "\n".join(last))
    if code:
        raise LaunchError(
            f"SkyPilot could not bring up {name} with --min-vram {settings.min_vram} --max-price {settings.max_price} "
            f"(exit code {code}):\n" + "\n".join(last)
        )
