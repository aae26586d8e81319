"""What a user's file defines can be used by a process that does not have the file."""

import subprocess
import sys
from pathlib import Path

import pytest

SENDER = """
import sys
from ray import cloudpickle
from roentgen.extensions import Registry, make_portable
found = Registry("roentgen.none", {}).find("mine_that_travels.py:grade")
make_portable(found.value)
sys.stdout.buffer.write(cloudpickle.dumps(found.value))
"""
RECEIVER = """
import sys, pickle
grade = pickle.loads(sys.stdin.buffer.read())
print(grade("four", None), type(grade("four", None)).__module__)
"""


@pytest.mark.parametrize("reference", ["mine_that_travels.py:grade", "mine_that_travels:grade"])
def test_a_function_travels_with_its_neighbors_and_ours_do_not(tmp_path: Path, reference: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "neighbor_that_travels.py").write_text("def length(text):\n    return len(text)\n")
    (here / "mine_that_travels.py").write_text(
        "from eval_jobs.verdicts import Verdict\nfrom neighbor_that_travels import length\nRIGHT = 4\n"
        "def grade(output, problem):\n    return Verdict(length(output) == RIGHT, output)\n"
    )
    sent = subprocess.run(
        [sys.executable, "-c", SENDER.replace("mine_that_travels.py:grade", reference)],
        cwd=here, capture_output=True, check=True,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RECEIVER], cwd=there, input=sent.stdout, capture_output=True, check=False
    )
    assert done.stdout.decode() == "Verdict(correct=True, answer='four', values={}) eval_jobs.verdicts\n", (
        done.stderr.decode()
    )
