"""Defaults that more than one package or file needs, each written once.

A default that one settings model alone needs is that model's field. cluster.yaml, serve.yaml and cluster/start.sh cannot
import these values; a test compares them.
"""

HOST = "127.0.0.1"

PORT = 8000
"""Port of a server."""

CLUSTER_NAME = "roentgen"

CLUSTER_PORT = 8001
"""Port of a server that `roentgen up` launches, also on this side of the tunnel, where a local server may use 8000."""

DASHBOARD_PORT = 8265
"""Port of Ray's dashboard, which accepts jobs and Serve's configuration."""

EMBEDDED_MODEL = "smollm2-135m"
"""The model that is installed as a package and needs no model hub."""

CLUSTER_MODEL = "Qwen/Qwen3-0.6B"
"""The model that a cluster serves by default."""

STORE = "activations"
"""Default folder of the activation store."""


RESULTS = "results"
"""Folder of the runs that are given no other."""


def base_url(port: int = PORT, host: str = HOST) -> str:
    """Return a server's base URL for OpenAI clients."""
    return f"http://{host}:{port}/v1"
