"""Extensions are found by name, by reference and by entry point, and a wrong one is told what was wrong."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from roentgen.extensions import ExtensionError, Registry, file_of, given, in_file, is_reference

REGISTRY: Registry[object] = Registry("roentgen.things", {"plain": len})

SOURCE = """
from neighbor import SUFFIX

def grade(output, problem):
    return output + SUFFIX

class Box:
    inner = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two modules, which is the working directory."""
    (tmp_path / "graders_under_test.py").write_text(SOURCE)
    (tmp_path / "neighbor.py").write_text("SUFFIX = '!'\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_name_is_what_is_built_in() -> None:
    found = REGISTRY.find("plain")
    assert (found.value, found.name, found.reference, found.built_in) == (len, "plain", None, True)


def test_a_function_in_a_module_and_in_a_file(folder: Path) -> None:
    in_module = REGISTRY.find("graders_under_test:grade")
    from_file = REGISTRY.find(str(folder / "graders_under_test.py") + ":grade")
    assert in_module.value("a", None) == from_file.value("a", None) == "a!"
    assert (in_module.name, in_module.reference) == ("grade", "graders_under_test:grade")
    assert from_file.reference == f"{folder}/graders_under_test.py:grade"
    assert in_module.digest == from_file.digest is not None
    assert REGISTRY.find("graders_under_test.py:grade").reference == from_file.reference  # as seen from any folder
    assert REGISTRY.find("graders_under_test.py:Box.inner").value == 7


def test_neighbors_of_one_name_are_not_mixed_up(folder: Path) -> None:
    """Python keeps one module of a name, so the second file would have had the first one's neighbor."""
    REGISTRY.find("graders_under_test.py:grade")
    other = folder / "other"
    other.mkdir()
    (other / "loud.py").write_text(SOURCE)
    (other / "quiet.py").write_text("def grade(output, problem):\n    return output\n")
    (other / "neighbor.py").write_text("SUFFIX = '!!!'\n")
    assert REGISTRY.find(f"{other}/quiet.py:grade").value("a", None) == "a"  # it does not import it
    with pytest.raises(ExtensionError, match=rf"{other} has a module 'neighbor'.*\({folder}/neighbor.py\); rename one"):
        REGISTRY.find(f"{other}/loud.py:grade")
    assert sys.modules["neighbor"].SUFFIX == "!"
    (other / "neighbor.py").rename(other / "far.py")
    (other / "loud.py").write_text(SOURCE.replace("neighbor", "far"))
    assert REGISTRY.find(f"{other}/loud.py:grade").value("a", None) == "a!!!"


def test_an_installed_package_declares_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real distribution, as pip would leave it."""
    package = folder / "installed"
    (package / "mine-1.dist-info").mkdir(parents=True)
    (package / "mine-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    declared = "[roentgen.things]\nlatin = mine_of_tests:salve\nbroken = mine_of_tests:vale\n"
    (package / "mine-1.dist-info" / "entry_points.txt").write_text(declared)
    (package / "mine_of_tests.py").write_text("def salve():\n    return 'salve'\n")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(package))
        assert REGISTRY.names == ["plain", "latin", "broken"]
        assert "latin" in REGISTRY
        found = REGISTRY.find("latin")
        assert (found.value(), found.name, found.reference) == ("salve", "latin", "latin")
        with pytest.raises(
            ExtensionError, match=r"'broken', an entry point of roentgen\.things: .*AttributeError.*vale"
        ):
            REGISTRY.find("broken")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plane", r"'plane' is unknown; allowed are plain, and a reference, module:name .*Did you mean plain\?"),
        ("graders_under_test:grades", r"graders_under_test\.py has no 'grades'; it defines SUFFIX, grade, Box"),
        ("no_such_module:grade", "there is no module 'no_such_module' in .* or in the installed packages"),
        ("nowhere.py:grade", r"there is no file .*/nowhere\.py"),
        ("wrong.py:grade", r"wrong\.py cannot be imported: SyntaxError: .*\(line 1\)"),
        ("raising.py:grade", r"raising\.py cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_not_found_says_what_there_is(folder: Path, name: str, said: str) -> None:
    (folder / "wrong.py").write_text("def grade(:\n")
    (folder / "raising.py").write_text("1 / 0\n")
    with pytest.raises(ExtensionError, match=said):
        REGISTRY.find(name)


def test_references_are_told_from_names_paths_and_datasets() -> None:
    assert [is_reference(text) for text in ("a.b:c", "x/y z.py:f.g", "plain", "mine.jsonl", "a:b:c", "http://h:1", "a:")] == [
        True, True, False, False, False, False, False,
    ]  # fmt: skip
    assert file_of("/x/y.py:f") == (Path("/x/y.py"), "f")
    assert file_of("a.b:c") is None


def test_what_a_cluster_can_be_sent_is_one_file(folder: Path) -> None:
    assert in_file("graders_under_test:grade") == f"{folder}/graders_under_test.py:grade"
    assert in_file("eval_jobs.extractors:judge") is None
    assert in_file("json:loads") is None


def test_an_object_is_called_by_its_own_name() -> None:
    class Grader:
        def __call__(self) -> None: ...

    assert [given(one).name for one in (Grader(), lambda: 1, len)] == ["Grader", "lambda", "len"]
    assert given(Grader()).reference is None
