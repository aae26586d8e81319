"""Background computation takes no threads from concurrent computation."""

import subprocess
import sys

import pytest

COUNTED = """
import sys, threading, psutil, torch
from roentgen.store.threads import limit_to_one_thread

torch.set_num_threads(2)
rows = torch.randn(1 << 22)
rows.sum()  # this thread has its team now
added = []

def compute():
    if sys.argv[1] == "alone":
        limit_to_one_thread()
    before = psutil.Process().num_threads()
    rows.sum()
    added.append(psutil.Process().num_threads() - before)

thread = threading.Thread(target=compute)
thread.start()
thread.join()
print(*added, torch.get_num_threads())
"""


@pytest.mark.parametrize(("how", "added"), [("alone", 0), ("as usual", 1)])
def test_a_thread_that_computes_alone_starts_none(how: str, added: int) -> None:
    said = subprocess.run([sys.executable, "-c", COUNTED, how], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(added), "2"]  # and the other thread goes on with two
