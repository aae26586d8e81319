"""The example extensions do what they say, each given as a user gives it."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from eval_jobs.extractors import choose_scorer
from eval_jobs.problems import Problem, read_source
from eval_jobs.prompts import choose_prompt
from eval_jobs.verdicts import Output, ScoringFailedError, Verdict, run_scorer
from probes.choosing import choose_kind
from probes.errors import ProbeDataError
from probes.labels import Target
from roentgen.runs import Run
from roentgen.store import Session
from tests.conftest import ROENTGEN, RayHome, Server
from tests.eval_jobs.stand_in import StandIn, running

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "extensions"
KENYA = "What is the capital of Kenya?"


def capitals() -> list[Problem]:
    return list(read_source(f"{EXAMPLES}/capitals.py:capitals"))


def test_problems() -> None:
    found = capitals()
    assert len(found) == 12
    kenya = found[2]
    assert (kenya.problem_id, kenya.question, kenya.gold) == ("capital-of-kenya", KENYA, "Nairobi")
    assert kenya.labels == {"continent": "Africa", "population": 55.1, "large": False}


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("SHORT", [("user", f"{KENYA} Answer with one word.")]),
        (
            "hinted",
            [("system", "You know geography."), ("user", f"{KENYA}\n(Hint: it is in Africa.)\nAnswer with one word.")],
        ),
        (
            "dialog",
            [
                ("user", "I will ask for a capital. Reply with its name only."),
                ("assistant", "All right."),
                ("user", KENYA),
            ],
        ),
    ],
)
def test_prompts(name: str, messages: list[tuple[str, str]]) -> None:
    posed = choose_prompt(f"{EXAMPLES}/prompts.py:{name}").messages(capitals()[2])
    assert [(message["role"], message["content"]) for message in posed] == messages


@pytest.mark.parametrize(
    ("name", "output", "verdict"),
    [
        ("mentions", "It is nairobi.", Verdict(True, "It is nairobi.")),
        ("mentions", "Mombasa", Verdict(False, "Mombasa")),
        ("first_word", "**Nairobi**, I think", Verdict(True, "Nairobi", {"words": 3, "cut": True})),
        ("first_word", " ", Verdict(False, None, {"words": 0, "cut": True})),
    ],
)
async def test_scorers(name: str, output: str, verdict: Verdict) -> None:
    scorer = choose_scorer(f"{EXAMPLES}/scorers.py:{name}")
    assert await run_scorer(name, scorer.value, Output(output, (), "length"), capitals()[2]) == verdict


async def test_a_judge_is_asked_through_the_openai_route(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = choose_scorer(f"{EXAMPLES}/judge.py:judge").value
    with running(StandIn(reply="8")) as server:
        monkeypatch.setenv("JUDGE_BASE_URL", server.base_url)
        monkeypatch.setenv("JUDGE_MODEL", "stand-in")
        verdict = await run_scorer("judge", judge, Output("Nairobi!"), capitals()[2])
        assert verdict == Verdict(True, "Nairobi!", {"rating": 8})
        (request,) = server.requests
        assert f"Question: {KENYA}\nRight answer: Nairobi\nGiven answer: Nairobi!" in request["messages"][-1]["content"]
        server.reply = "Well"
        with pytest.raises(
            ScoringFailedError, match=r"the scorer judge raised ValueError: the judge gave no rating: 'Well'"
        ):
            await run_scorer("judge", judge, Output("Nairobi!"), capitals()[2])


def test_a_kind_of_probe() -> None:
    """Against the definition: the nearer center, dimension by dimension."""
    kind = choose_kind(Target("t", "binary", np.array([True])), f"{EXAMPLES}/probe_kind.py:NEAREST")
    X, y = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(40) % 3 == 0
    scores = kind.fit(X, y, torch.arange(40), torch.tensor(kind.strengths)).scores(X)
    assert scores.shape == (2, 3, 1, 40)
    for strength, found in zip(kind.strengths, scores[1], strict=True):
        rows = X[1] / X[1].std(0) ** strength
        far, near = (torch.cdist(rows, rows[which].mean(0)[None])[:, 0] ** 2 for which in (~y, y))
        torch.testing.assert_close(found[0], (far - near) / 2)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return None", r"kind: fit returned None \(NoneType\); allowed are probes with a method scores\(X\)"),
        (
            "return Flat()",
            r"probes whose scores are \(4,\); allowed are \[models, strengths, outputs, rows\], here \[1, 1, outp",
        ),
        (
            "return X.nothing",
            r"kind: fit raised AttributeError: .*kinds_under_test_\d\.py, line 5\) on X of \(1, 4, 3\)",
        ),
    ],
)
def test_a_wrong_kind_is_told_what_it_returned(tmp_path: Path, body: str, said: str) -> None:
    file = tmp_path / f"kinds_under_test_{len(said) % 10}.py"
    flat = "class Flat:\n    def scores(self, X):\n        return X[0, :, 0]\n"
    file.write_text(f"{flat}def fit(X, y, groups, strengths):\n    {body}\n")
    target = Target("t", "binary", np.array([True]))
    with pytest.raises(ProbeDataError, match=said):
        choose_kind(target, f"{file}:fit").fit(torch.ones(1, 4, 3), torch.ones(4) > 0, torch.ones(4), torch.ones(1))
    with pytest.raises(ProbeDataError, match=r"'logistics' is unknown; allowed are logistic, .* Did you mean logistic"):
        choose_kind(target, "logistics")


@pytest.mark.integration
def test_problems_prompt_judge_and_probe_of_one_s_own(server: Server, tmp_path: Path, ray_home: RayHome) -> None:
    """The whole of it: a served model answers, is judged by itself, and probes read a field of the problems."""
    run = tmp_path / "run"
    environment = ray_home.environment | {"JUDGE_BASE_URL": server.base_url, "JUDGE_MODEL": "smollm2-135m"}
    command = [
        ROENTGEN, "eval", "--problems", f"{EXAMPLES}/capitals.py:capitals", "--samples", "12", "--prompt",
        f"{EXAMPLES}/prompts.py:dialog", "--extractor", f"{EXAMPLES}/judge.py:judge", "--base-url", server.base_url,
        "--max-tokens", "8", "--parallel", "12", "--layers", "12,16", "--hook-points", "resid_post", "--output", str(run),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode in (0, 1), done.stderr  # a small judge may give no rating
    samples = [sample for sample in Run(run).read_samples() if sample.error is None]
    assert len(samples) >= 8
    assert all(0 <= int(str(sample.values["rating"])) <= 10 for sample in samples)
    stored = Session.open(samples[0].rollouts[0].uri).rollouts()
    assert {labels["continent"] for labels in stored["labels"]} <= {"Europe", "Asia", "Africa"}
    options = ["--label", "large", "--kind", f"{EXAMPLES}/probe_kind.py:NEAREST"]
    trained = subprocess.run(
        [ROENTGEN, "probe", "train", str(run), *options], capture_output=True, text=True, check=False, timeout=300
    )
    assert trained.returncode == 0, trained.stderr
    results = json.loads((run / "probes" / "large+nearest" / "results.json").read_text())
    assert (results["kind"], len(results["kind_hash"]), len(results["keys"])) == ("nearest", 16, 2)
