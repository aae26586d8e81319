"""Tests that take turns: CI runs a share of those marked `rotating`, chosen by the commit.

Some tests are many of one kind: ten clients, the cases of another project's suite, the same rows in more precisions. CI has
no time for all of them. `--share 3` keeps a third of them, and every test that is not marked; without it, all run. A marked
file or class is kept or left out whole, because its tests share what they set up.
"""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

SECONDS_A_DAY = 86_400


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=int, default=1, metavar="N", help="run every N-th of the tests marked rotating")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shares: int = config.getoption("share")
    if shares < 1:
        raise pytest.UsageError(f"--share: {shares} is no number of shares; allowed are whole numbers from 1")
    units = {item: unit for item in items if (unit := _unit(item)) is not None}
    kept = turn(sorted(set(units.values())), shares, commit_number(Path(str(config.rootpath))))
    left_out = [item for item, unit in units.items() if unit not in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def turn(units: Sequence[str], shares: int, number: int) -> frozenset[str]:
    """Return the units whose turn it is; `shares` numbers in a row give each unit its turn once."""
    return frozenset(unit for place, unit in enumerate(units) if (place + number) % shares == 0)


def _unit(item: pytest.Item) -> str | None:
    """Return the test, class or file that the mark stands at, None without one."""
    return next((node.nodeid for node, _ in item.iter_markers_with_node("rotating")), None)


def commit_number(root: Path) -> int:
    """Return a number that the commit decides; where there is none, the day."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return int(done.stdout, 16) if done.returncode == 0 else int(time.time()) // SECONDS_A_DAY
