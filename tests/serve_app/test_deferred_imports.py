"""What transformers imports, and what it can call none the less."""

import subprocess
import sys

SCRIPT = """
import sys
import serve_app
from transformers import LlamaForCausalLM
assert not {"sklearn", "scipy"} & sys.modules.keys()

from transformers import utils
from transformers.generation import candidate_generator
from transformers.loss import loss_for_object_detection
assert candidate_generator.is_sklearn_available is utils.is_sklearn_available
assert loss_for_object_detection.is_scipy_available is utils.is_scipy_available
assert utils.is_sklearn_available() and utils.is_scipy_available()

_, rates, _ = candidate_generator.roc_curve([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
assert rates.tolist() == [0.0, 0.5, 0.5, 1.0, 1.0]
rows, columns = loss_for_object_detection.linear_sum_assignment([[2, 1], [1, 3]])
assert columns.tolist() == [1, 0]
"""


def test_transformers_is_imported_without_large_libraries_which_are_there_when_they_are_called() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
