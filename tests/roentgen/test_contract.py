import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from roentgen.contract import (
    MAX_LABEL_BYTES,
    ActivationRequest,
    MaxTokens,
    Positions,
    Temperature,
    TopP,
    WrittenHookPoints,
    WrittenLayers,
    canonical_hash,
    check_session_id,
    count_rows,
    split_key,
    stored_key,
)


def test_lists_are_text_on_a_command_line_only() -> None:
    layers, hook_points = TypeAdapter(WrittenLayers), TypeAdapter(WrittenHookPoints)
    assert [layers.validate_python(text) for text in ("0,12,-1", "all", (3,))] == [(0, 12, -1), "all", (3,)]
    assert hook_points.validate_python("resid_pre, mlp.output") == ("resid_pre", "mlp.output")
    with pytest.raises(
        ValidationError, match="'8,x' is not a list of layers; allowed are 8,12,16 and the like, or all"
    ):
        layers.validate_python("8,x")
    for written in ({"layers": "0,12"}, {"hook_points": "resid_pre,resid_post"}):
        with pytest.raises(ValidationError):
            ActivationRequest.model_validate(written)


def test_limits_that_are_shared_are_those_of_json_schema() -> None:
    limits = [TypeAdapter(shared).json_schema() for shared in (MaxTokens, Temperature, TopP)]
    assert [limits[0]["minimum"], limits[1]["minimum"], limits[1]["maximum"]] == [1, 0, 2]
    assert (limits[2]["exclusiveMinimum"], limits[2]["maximum"]) == (0, 1)
    with pytest.raises(ValidationError, match="a number is needed, not true"):
        TypeAdapter(MaxTokens).validate_python(True)


@pytest.mark.parametrize("name", ["a", "run-1", "A.b_c-9", "x" * 64])
def test_safe_session_ids_pass(name: str) -> None:
    assert check_session_id(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "../x", "a/b", "*", "a b", "x" * 65, "a\n", "é"])
def test_unsafe_session_ids_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="session id"):
        check_session_id(name)


def test_a_full_capture_has_a_row_per_token_but_the_last_of_a_completion() -> None:
    n_prompt, n_completion, rows = [4, 4, 4, 1], [0, 1, 3, 2], [4, 4, 6, 2]
    assert [count_rows(*pair) for pair in zip(n_prompt, n_completion, strict=True)] == rows
    assert count_rows(np.array(n_prompt), np.array(n_completion)).tolist() == rows
    frame = pd.DataFrame({"n_prompt": n_prompt, "n_completion": n_completion}, dtype="int32")
    assert count_rows(frame["n_prompt"], frame["n_completion"]).tolist() == rows


@pytest.mark.parametrize(
    ("policy", "n_prompt", "n_rows", "expected"),
    [
        ("all", 3, 5, [0, 1, 2, 3, 4]),
        ("prompt", 3, 5, [0, 1, 2]),
        ("generated", 3, 5, [3, 4]),
        ("generated", 3, 3, []),  # one token was generated, so none was fed: nothing to select is not an error
        ("last_prompt", 3, 5, [2]),
        ("last", 3, 5, [4]),
        ("stride:2", 3, 5, [0, 2, 4]),
        ("mean_prompt", 3, 5, [0, 1, 2]),
        ("mean_generated", 3, 5, [3, 4]),
    ],
)
def test_positions_select(policy: str, n_prompt: int, n_rows: int, expected: list[int]) -> None:
    assert list(Positions.parse(policy).select(n_prompt, n_rows)) == expected
    assert str(Positions.parse(policy)) == policy


@pytest.mark.parametrize(
    "policy", ["", "ALL", "stride", "stride:0", "stride:-1", "stride:x", "stride:²", "all:2", "mean"]
)
def test_bad_policies_are_refused(policy: str) -> None:
    with pytest.raises(ValueError, match="not a position policy"):
        Positions.parse(policy)


def test_the_request_names_what_is_wrong() -> None:
    with pytest.raises(ValidationError, match="session id"):
        ActivationRequest(session_id="../x")
    with pytest.raises(ValidationError, match="position policy"):
        ActivationRequest(positions="everywhere")
    with pytest.raises(ValidationError, match="Extra inputs"):
        ActivationRequest.model_validate({"layer": [1]})


KEY = {"config_hash": "c", "problem_id": "p"}


@pytest.mark.parametrize(
    ("request_", "where"),
    [
        ({"key": {**KEY, "turn": 2**31}}, ("key", "turn")),
        ({"key": {**KEY, "epoch": 2**31}}, ("key", "epoch")),
        ({"key": {**KEY, "epoch": True}}, ("key", "epoch")),
        ({"key": {**KEY, "turn": 10**400}}, ("key", "turn")),
        ({"key": {**KEY, "problem_id": "\ud83d"}}, ("key", "problem_id")),
        ({"key": {**KEY, "config_hash": "\udc00"}}, ("key", "config_hash")),
        ({"labels": {"a": float("nan")}}, ("labels", "a")),
        ({"labels": {"a": float("-inf")}}, ("labels", "a")),
        ({"labels": {"a": "\ud83d"}}, ("labels", "a")),
        ({"labels": {"a": {"b": 1}}}, ("labels", "a")),
        ({"labels": {"a": [1]}}, ("labels", "a")),
        ({"labels": {"\ud83d": 1}}, ("labels",)),
        ({"labels": {"a": "x" * MAX_LABEL_BYTES}}, ("labels",)),
        ({"hook_points": ["\ud83d"]}, ("hook_points", 0)),
        ({"layers": [0, True]}, ("layers", "tuple[function-before[no_booleans(), int], ...]", 1)),
        ({"positions": f"stride:{2**31}"}, ("positions",)),
        ({"positions": "stride:" + "9" * 5000}, ("positions",)),
    ],
)
def test_what_the_store_does_not_hold_is_refused_by_name(
    request_: dict[str, object], where: tuple[object, ...]
) -> None:
    with pytest.raises(ValidationError) as caught:
        ActivationRequest.model_validate(request_)
    assert caught.value.errors()[0]["loc"] == where


def test_the_defaults_are_the_seeds() -> None:
    request = ActivationRequest()
    assert request.layers == (8, 12, 16)
    assert request.hook_points == ("input_layernorm.output", "post_attention_layernorm.output")
    assert request.positions == "all"


@given(st.sampled_from(["resid_post", "mlp.gate_proj.output"]), st.none() | st.integers(0, 200))
def test_keys_round_trip(hook_point: str, layer: int | None) -> None:
    assert split_key(stored_key(hook_point, layer)) == (hook_point, layer)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_the_hash_ignores_order(value: dict[str, object]) -> None:
    assert canonical_hash(value) == canonical_hash(dict(reversed(value.items())))
