"""Defaults that more than one package or file needs, each written once.

A default that one settings model alone needs is that model's field. cluster.yaml, serve.yaml and cluster/start.sh cannot
import these values; a test compares them.
"""

HOST = "127.0.0.1"

PORT = 8000
"""Port of a server."""

CLUSTER_NAME = "roentgen"

CLUSTER_PORT = 8001
"""Port of a server that `roentgen up` launches, also at this end of the tunnel, where 8000 may be a local server's."""

DASHBOARD_PORT = 8265
"""Port of Ray's dashboard, which takes jobs and Serve's configuration."""

EMBEDDED_MODEL = "smollm2-135m"
"""The model that comes as a package and needs no model hub."""

CLUSTER_MODEL = "Qwen/Qwen3-0.6B"
"""The model that a cluster serves."""

STORE = "activations"
"""Folder of the activation store."""


RESULTS = "results"
"""Folder of the runs that are given no other."""


def base_url(port: int = PORT, host: str = HOST) -> str:
    """Return the address that OpenAI clients of a server need."""
    return f"http://{host}:{port}/v1"
