"""The server that an evaluation starts for itself."""

import pytest

from eval_jobs.settings import check_settings
from roentgen.options import read_options
from roentgen.serving.for_evaluation import config_for
from serve_app.config import ServerConfig


@pytest.mark.parametrize(("parallel", "together"), [("1", 32), ("64", 64), ("auto", 32)])
def test_it_generates_together_what_is_in_flight(parallel: str, together: int) -> None:
    config = config_for(check_settings(model="m", dtype="float32", parallel=parallel))
    assert (config.model, config.dtype, config.max_batch) == ("m", "float32", together)
    assert read_options(ServerConfig, {"model": "m"}).max_batch == 32
