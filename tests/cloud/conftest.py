"""SkyPilot's own environment (`make cloud-env`), and a home folder with a small catalog of machines and prices."""

import os
import shutil
from pathlib import Path

import pytest

from roentgen.cloud.skypilot import SkyPilot
from roentgen.serving.local_server import LaunchError

collect_ignore = [] if os.environ.get("ROENTGEN_TEST_CLOUD") else ["test_choices.py", "test_launch.py"]
CATALOGS = Path(__file__).parent / "catalogs"


@pytest.fixture(scope="session")
def sky_python() -> Path:
    """SkyPilot's interpreter."""
    try:
        return Path(SkyPilot().command).parent / "python"
    except LaunchError as error:
        pytest.skip(str(error))


def make_home(home: Path) -> dict[str, str]:
    """Lay out a home folder with the catalog, as SkyPilot downloads it; returns the environment that uses it."""
    for file in CATALOGS.glob("*.csv"):
        cloud, _, name = file.name.partition("_")
        target = home / ".sky" / "catalogs" / "v8" / cloud / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return {**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
