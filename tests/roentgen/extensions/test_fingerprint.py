"""A fingerprint changes with what a function does, and with nothing else."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from roentgen.extensions import Registry, fingerprint

SOURCE = """
import math

LIMIT = 3
UNUSED = 1

def helper(x):
    return x + 1

def unused():
    return 0

def grade(output, problem):
    return [helper(len(one)) < LIMIT for one in [output]][0] and math.pi > 3
"""


@pytest.fixture
def grade(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Gives `grade` of a source, each in a file of its own."""
    before = set(sys.modules)

    def load(source: str) -> Any:
        file = tmp_path / str(len(list(tmp_path.iterdir()))) / "graders.py"
        file.parent.mkdir()
        file.write_text(source)
        return Registry[Any]("roentgen.none", {}).find(f"{file}:grade").value

    yield load
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("x + 1", "x + 2", False),  # what it calls
        ("LIMIT = 3", "LIMIT = 4", False),  # what it reads, inside a comprehension
        ("math.pi > 3", "math.pi > 4", False),
        ("UNUSED = 1", "UNUSED = 2", True),
        ("return 0", "return 5", True),
    ],
)
def test_it_follows_what_is_used(grade: Callable[[str], Any], old: str, new: str, same: bool) -> None:
    assert (fingerprint(grade(SOURCE)) == fingerprint(grade(SOURCE.replace(old, new)))) is same


def test_it_follows_closures_partials_objects_and_methods() -> None:
    def grader(limit: int) -> Callable[[str], bool]:
        return lambda output: len(output) < limit

    class Grader:
        def __init__(self, limit: int) -> None:
            self.limit = limit

        def grade(self, output: str) -> bool:
            return len(output) < self.limit

    def longer(limit: int, output: str) -> bool:
        return len(output) < limit

    for make in (grader, Grader, lambda limit: Grader(limit).grade, lambda limit: partial(longer, limit)):
        assert fingerprint(make(3)) == fingerprint(make(3)) != fingerprint(make(4))


def test_recursion_and_cycles_end() -> None:
    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    cycle: list[Any] = []
    cycle.append(cycle)
    assert fingerprint(even) != fingerprint(odd)
    assert fingerprint(cycle)


def test_a_function_without_a_file_has_one_too() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("def one(x):\n    return x + 1\ndef two(x):\n    return x * 2\n", names)
    assert fingerprint(names["one"]) != fingerprint(names["two"])
