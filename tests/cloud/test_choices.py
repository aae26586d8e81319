"""cluster.yaml and eval.yaml before SkyPilot's own schema, and what its optimizer makes of memory, price and spot.

Prices in the catalog are made up but like AWS's: T4 16 GB 0.526 (spot 0.21), L4 24 GB 0.805 (0.31), A10G 24 GB 1.006 (0.42),
H100 80 GB 6.88 (2.5), a machine without GPU 0.384.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from roentgen.cloud.skypilot import ROOT
from roentgen.cloud.task import ClusterSettings, rewrite
from tests.cloud.conftest import make_home

CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text()) | {"workdir": str(ROOT)}


def launched(**options: object) -> dict[str, Any]:
    return rewrite(CLUSTER, ClusterSettings.model_validate(options))


CASES: dict[str, dict[str, Any]] = {
    "as it stands": CLUSTER,
    "eval": yaml.safe_load((ROOT / "eval.yaml").read_text()),
    "up's defaults": launched(),
    "24 GB within 1 dollar": launched(min_vram=24, max_price=1),
    "24 GB within 60 cents": launched(min_vram=24),
    "24 GB on spot within 60 cents": launched(min_vram=24, spot=True),
    "17 GB": launched(min_vram=17, max_price=10),
    "80 GB": launched(min_vram=80, max_price=10),
    "no GPU": launched(min_vram=0),
    "four nodes": launched(nodes=4, store="s3://bucket/folder", open_port=True, infra="aws/us-east-1"),
    "a misspelt field": CLUSTER | {"num_node": 3},
}


@pytest.fixture(scope="module")
def choices(sky_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What SkyPilot chooses for every case; asked once, since it takes seconds to import."""
    folder = tmp_path_factory.mktemp("choices")
    file = folder / "cases.json"
    file.write_text(json.dumps(CASES))
    command = [str(sky_python), str(Path(__file__).parent / "choose.py"), str(file)]
    done = subprocess.run(
        command, env=make_home(folder / "home"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(file.read_text()))


@pytest.mark.parametrize(
    ("case", "instance", "cost", "spot"),
    [
        ("as it stands", "g4dn.xlarge", 0.526, False),
        ("up's defaults", "g4dn.xlarge", 0.526, False),
        ("24 GB within 1 dollar", "g6.xlarge", 0.805, False),
        ("24 GB on spot within 60 cents", "g6.xlarge", 0.31, True),
        ("17 GB", "g6.xlarge", 0.805, False),
        ("80 GB", "p5.4xlarge", 6.88, False),
        ("no GPU", "m6i.2xlarge", 0.384, False),
        ("four nodes", "g4dn.xlarge", 0.526, False),
    ],
)
def test_the_cheapest_machine_within_the_limits_is_chosen(
    choices: dict[str, dict[str, Any]], case: str, instance: str, cost: float, spot: bool
) -> None:
    chosen = choices[case]
    assert chosen.get("instance") == instance, chosen
    assert chosen["cost"] == pytest.approx(cost)
    assert chosen["spot"] is spot
    assert bool(chosen["accelerators"]) is (case != "no GPU")


def test_a_price_that_nothing_meets_is_an_error(choices: dict[str, dict[str, Any]]) -> None:
    assert choices["24 GB within 60 cents"]["error"].startswith("ResourcesUnavailableError")


def test_the_schema_is_really_checked(choices: dict[str, dict[str, Any]]) -> None:
    assert "num_node" in choices["a misspelt field"]["error"]
    assert "instance" in choices["eval"], choices["eval"]
