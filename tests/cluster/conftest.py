"""Three hosts on this machine, each with cluster.yaml's own start script; started once, since that takes two minutes."""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from roentgen.model_names import cache_folder
from serve_app.models.model_source import locate
from tests.cluster.cluster import Cluster
from tests.cluster.nodes import GATEWAY, Nodes, why_not
from tests.s3 import lock, s3_endpoint

collect_ignore = [] if os.environ.get("ROENTGEN_TEST_CLUSTER") else ["test_cluster.py"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster with two replicas of SmolLM2-135M and a store in a folder that all nodes see.

    It is given the address and the keys of an S3 server on this machine too, as `roentgen up` gives them.
    """
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="rt-nodes-"))
    locate("smollm2-135m")  # converted once, here, for all nodes
    environment = {
        "VENV": sys.prefix,
        "MODEL": "smollm2-135m",
        "DTYPE": "float32",  # rows are compared with a reference to 1e-4
        "STORE": str(folder / "store"),
        "PORT": "8000",
        "REPLICAS": "2",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "ROENTGEN_API_KEY": secrets.token_hex(16),
        "ROENTGEN_CACHE": str(cache_folder()),
        "HF_HUB_OFFLINE": "1",
        # Two replicas with a thread per core share the cores: one that waits for another must not spin meanwhile.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Three nodes share this machine's memory, and each would take a third of it for objects that nobody makes here.
        "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.01",
    }
    try:
        with Nodes(3, folder, environment) as nodes, s3_endpoint(folder / "moto.log", GATEWAY) as endpoint:
            nodes.environment |= {"AWS_ENDPOINT_URL": endpoint, **lock(endpoint)}
            running = Cluster(nodes)
            nodes.launch()
            yield running
    finally:
        shutil.rmtree(folder)
