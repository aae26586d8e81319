"""A stand-in server and one real local Ray for the whole folder."""

from collections.abc import Iterator, Sequence

import pytest
import ray

from eval_jobs.endpoint import Endpoint
from eval_jobs.problems import Problem
from eval_jobs.prompts import ANSWER_LINE
from eval_jobs.rollout import RolloutPlan
from eval_jobs.selection import Selection, load_problems
from eval_jobs.settings import EvalSettings
from eval_jobs.variants import Attempt, Variant
from roentgen.contract import ActivationRequest
from tests.eval_jobs.stand_in import StandIn, running

PLAIN = Variant(None, "", "0123456789abcdef")


@pytest.fixture
def server() -> Iterator[StandIn]:
    with running(StandIn()) as stand_in:
        yield stand_in


@pytest.fixture(scope="package")
def local_ray() -> Iterator[str]:
    """The address of a Ray that this process is connected to."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def take(source: str, samples: int) -> list[Problem]:
    """The first problems of a source."""
    return load_problems(Selection(source=source, samples=samples))


def attempts_at(problems: Sequence[Problem]) -> list[Attempt]:
    """One attempt at each problem."""
    return [Attempt(problem, PLAIN) for problem in problems]


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    """Twelve problems, all different."""
    return take("arithmetic", 12)


@pytest.fixture
def plan(server: StandIn) -> RolloutPlan:
    return make_plan(server.base_url)


def make_plan(base_url: str, max_retries: int = 2, timeout: float = 30.0, capture: bool = False) -> RolloutPlan:
    return RolloutPlan(
        endpoint=Endpoint(base_url, timeout=timeout, max_retries=max_retries),
        model="stand-in",
        prompt=ANSWER_LINE,
        sampling=EvalSettings().sampling,
        extractor="answer",
        capture=ActivationRequest(session_id="session") if capture else None,
    )
