"""An evaluation on a cluster: which files of this machine go there."""

from pathlib import Path

from roentgen.cloud.evaluate import sent_files
from roentgen.extensions import Registry


def test_a_python_file_goes_with_its_neighbors_and_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "parts_of_launched").mkdir(parents=True)
    two.mkdir()
    (one / "parts_of_launched" / "__init__.py").write_text("WORD = 'four'\n")
    (one / "unused_by_launched.py").write_text("")
    (one / "mine.py").write_text(
        "from parts_of_launched import WORD\ndef score(output, problem):\n    return WORD in output\n"
    )
    (two / "mine.py").write_text("def pose(problem):\n    return problem.question\n")
    (two / "problems.jsonl").write_text("")
    files: dict[str, Path | str] = {"--extractor": f"{one}/mine.py:score", "--prompt": f"{two}/mine.py:pose"}
    for reference in files.values():
        Registry("roentgen.none", {}).find(str(reference))
    copies, words = sent_files({**files, "--problems": two / "problems.jsonl"})
    assert copies == [
        (one / "mine.py", "runs/.files"),
        (one / "parts_of_launched" / "__init__.py", "runs/.files/parts_of_launched"),
        (two / "mine.py", "runs/.files/2"),
        (two / "problems.jsonl", "runs/.files/2"),
    ]
    assert words == [
        "--extractor ~/runs/.files/mine.py:score",
        "--prompt ~/runs/.files/2/mine.py:pose",
        "--problems ~/runs/.files/2/problems.jsonl",
    ]
