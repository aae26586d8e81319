"""What a script reads of its own arguments."""

import pytest

import roentgen
from eval_jobs import EvalError
from roentgen.argument_names import in_python, naming_arguments


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("--max-tokens: 0 is too few", "max_tokens: 0 is too few"),
        ("another --output, (more --samples)", "another output, (more samples)"),
        ("--extractor: 'x' is unknown", "scorer: 'x' is unknown"),
        ("`roentgen score RUN --extractor …` judges again", "`roentgen score RUN --extractor …` judges again"),
        ("'roentgen serve --port 1' or --base-url", "'roentgen serve --port 1' or base_url"),
        ("2 -- 3, a--b and --", "2 -- 3, a--b and --"),
    ],
)  # fmt: skip
def test_options_are_spelled_as_arguments(said: str, read: str) -> None:
    assert in_python(said, extractor="scorer") == read


def test_only_errors_of_our_own_are_spelled_anew() -> None:
    with pytest.raises(EvalError, match=r"^samples: none$") as told, naming_arguments(), naming_arguments():
        raise EvalError("--samples: none")
    assert told.value.for_console == "--samples: none"
    with pytest.raises(ValueError, match=r"^--samples: none$"), naming_arguments():
        raise ValueError("--samples: none")


def test_an_evaluation_and_a_server_name_their_arguments() -> None:
    with pytest.raises(EvalError, match=r"^parallel: 'x' is not allowed"):
        roentgen.evaluate(parallel="x")
    with pytest.raises(EvalError, match=r"^scorer: 'nobody' is unknown"):
        roentgen.evaluate(scorer="nobody")
    with pytest.raises(Exception, match=r"^port -1: not a valid port"), roentgen.serve(port=-1):
        pass
