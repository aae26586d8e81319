"""What SkyPilot's own optimizer chooses for a task; runs in its environment, with a hand-made catalog in a throwaway HOME.

python choose.py FILE.json      {"case": task, …}  ->  {"case": {"instance", "accelerators", "spot", "cost"} or {"error"}}
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import sky
from sky import clouds, optimizer

ENABLED = ("sky.check.get_cached_enabled_clouds_or_refresh", "sky.global_user_state.get_cached_enabled_clouds")


def choose(config: dict[str, Any]) -> dict[str, Any]:
    """Validate a task with SkyPilot's schema and let its optimizer choose a machine."""
    try:
        with sky.Dag() as dag:
            task = sky.Task.from_yaml_config(config)
        optimizer.Optimizer.optimize(dag, quiet=True)
    except Exception as error:  # noqa: BLE001 - whatever SkyPilot raises is the answer
        return {"error": f"{type(error).__name__}: {error}"}
    best = task.best_resources
    return {
        "instance": best.instance_type,
        "accelerators": best.accelerators or {},
        "spot": best.use_spot,
        "cost": best.get_cost(3600),
    }


if __name__ == "__main__":
    with mock.patch(ENABLED[0], return_value=[clouds.AWS()]), mock.patch(ENABLED[1], return_value=[clouds.AWS()]):
        cases = json.loads(Path(sys.argv[1]).read_text())
        Path(sys.argv[1]).write_text(json.dumps({name: choose(task) for name, task in cases.items()}))
