"""Savepoints: which selectors are taken, where they lead, and the names requests may use."""

import pytest
from pydantic import ValidationError

from roentgen.contract import ActivationRequest
from serve_app.capture.structure import CaptureRequestError, Tap
from serve_app.config import ModelChoice
from serve_app.models.savepoints import Savepoint
from tests.serve_app import tiny


@pytest.mark.parametrize(
    ("selector", "tap"),
    [
        ("model.layers[12].mlp", Tap("model.layers.12.mlp", "output")),
        ("model.layers.12", Tap("model.layers.12", "output")),
        ("model.layers[2].mlp.input", Tap("model.layers.2.mlp", "input")),
        ("lm_head.output", Tap("lm_head", "output")),
        ("output", Tap("output", "output")),
    ],
)
def test_where_a_selector_leads(selector: str, tap: Tap) -> None:
    assert Savepoint(name="here", selector=selector).tap == tap


@pytest.mark.parametrize(
    "selector",
    ["", "model.layers[-1]", "model.layers[i]", "model..norm", "f()", "a[0", "a b", "a.__import__('os')", "a\n", "é"],
)
def test_anything_else_is_refused_by_name(selector: str) -> None:
    with pytest.raises(ValidationError, match="is not a selector"):
        Savepoint(name="here", selector=selector)


@pytest.mark.parametrize("name", ["resid_post", "embed", "a.b", "", "x" * 65, "a/b", "a\n"])
def test_names_that_mean_something_else(name: str) -> None:
    with pytest.raises(ValidationError):
        Savepoint(name=name, selector="model.norm")


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValidationError, match="'a' is used twice"):
        ModelChoice(model_id="m", savepoints=[{"name": "a", "selector": "x"}, {"name": "a", "selector": "y"}])


def test_a_request_asks_for_a_savepoint_by_its_name() -> None:
    structure = tiny.loaded("llama").structure.with_savepoints(
        {"gate": Tap("model.layers.1.mlp.gate_proj", "output"), "block-1": Tap("model.layers.1", "output")}
    )
    asked = ActivationRequest(hook_points=("gate", "block-1"), layers=(0,))
    assert structure.resolve(asked) == {
        "gate": Tap("model.layers.1.mlp.gate_proj", "output"),
        "layers.1.resid_post": Tap("model.layers.1", "output"),  # a canonical hook point keeps its key
    }
    assert structure.record()["savepoints"]["gate"] == "model.layers.1.mlp.gate_proj.output"
    with pytest.raises(CaptureRequestError, match=r"far: .* has no module 'model.layers.99'"):
        structure.with_savepoints({"far": Tap("model.layers.99", "output")})
