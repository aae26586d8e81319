from pathlib import Path

import pytest

from tests.rotation import turn

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.rotating
@pytest.mark.parametrize("number", range(4))
def test_many(number): ...

@pytest.mark.rotating
class TestWhole:
    def test_one(self): ...
    def test_two(self): ...

def test_always(): ...
"""


def test_every_unit_has_its_turn_once() -> None:
    units = [f"unit {i}" for i in range(7)]
    turns = [turn(units, 3, number) for number in range(10, 13)]
    assert sorted(unit for kept in turns for unit in kept) == units
    assert turn(units, 1, 5) == frozenset(units)


@pytest.mark.parametrize(("shares", "least", "most"), [(1, 7, 7), (5, 2, 3)])
def test_a_marked_class_is_kept_whole_and_the_rest_always(
    pytester: pytest.Pytester, shares: int, least: int, most: int
) -> None:
    pytester.makeconftest((Path(__file__).parent / "rotation.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n    rotating: takes turns\n")
    pytester.makepyfile(TESTS)
    outcome = pytester.runpytest_inprocess("-p", "no:randomly", "--share", str(shares))
    assert least <= outcome.parseoutcomes()["passed"] <= most


def test_a_share_of_nothing_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((Path(__file__).parent / "rotation.py").read_text())
    outcome = pytester.runpytest_inprocess("--share", "0")
    outcome.stderr.fnmatch_lines(["*--share: 0 is no number of shares*"])
