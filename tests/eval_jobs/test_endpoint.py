"""The server is queried before anything runs: wrong addresses, keys and names fail within seconds with clear messages."""

from pathlib import Path

import pytest

from eval_jobs.endpoint import Endpoint, FatalRequestError, find_model, resolve_endpoint
from eval_jobs.hashed_config import ServedModelInfo
from tests.eval_jobs.stand_in import StandIn


def test_a_roentgen_server_says_what_it_serves(server: StandIn) -> None:
    assert find_model(Endpoint(server.base_url), None) == ServedModelInfo("stand-in", "r1", "float32", 30, 8)


def test_another_server_says_the_name_only(server: StandIn) -> None:
    server.models = [{"id": "a"}, {"id": "b"}]
    assert find_model(Endpoint(server.base_url), "b") == ServedModelInfo("b")
    with pytest.raises(FatalRequestError, match="serves a, b: choose one with --model"):
        find_model(Endpoint(server.base_url), None)
    with pytest.raises(FatalRequestError, match=r"--model: 'c' is not served at .*; it serves a, b"):
        find_model(Endpoint(server.base_url), "c")


@pytest.mark.parametrize("wanted", ["tiny", "{0}", "{0}/", "models/tiny", "./models/tiny/"])
def test_a_folder_is_asked_for_by_its_id_or_by_where_it_is(
    server: StandIn, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    server.models = [{"id": "tiny", "root": str(folder), "revision": "local-1"}]
    found = find_model(Endpoint(server.base_url), wanted.format(folder))
    assert (found.id, found.root) == ("tiny", str(folder))


def test_a_misspelt_model_is_answered_with_the_nearest(server: StandIn) -> None:
    with pytest.raises(FatalRequestError, match=r"it serves stand-in; did you mean 'stand-in'\?"):
        find_model(Endpoint(server.base_url), "stand_in")


def test_no_server() -> None:
    with pytest.raises(FatalRequestError, match=r"no server answers at http://127\.0\.0\.1:9/v1: start one with"):
        find_model(Endpoint("http://127.0.0.1:9/v1"), None)


def test_a_server_that_loads_its_model_is_waited_for(server: StandIn) -> None:
    server.not_ready = 6
    assert find_model(Endpoint(server.base_url), None).id == "stand-in"
    server.not_ready = 100
    with pytest.raises(FatalRequestError, match="503: starting a replica"):
        find_model(Endpoint(server.base_url), None)


def test_a_wrong_path(server: StandIn) -> None:
    with pytest.raises(FatalRequestError, match="404: no route /models"):
        find_model(Endpoint(server.base_url.removesuffix("/v1")), None)


def test_v1_may_be_left_out(server: StandIn) -> None:
    root = server.base_url.removesuffix("/v1")
    assert (
        resolve_endpoint(Endpoint(root)).base_url
        == resolve_endpoint(Endpoint(server.base_url)).base_url
        == server.base_url
    )
    assert resolve_endpoint(Endpoint(f"{root},{root}")).base_url == f"{server.base_url},{server.base_url}"
    with pytest.raises(
        FatalRequestError, match="404: no route /other/models"
    ):  # of what was given, not of what was tried
        resolve_endpoint(Endpoint(f"{root}/other"))
    with pytest.raises(FatalRequestError, match=r"no server answers at http://127\.0\.0\.1:9:"):
        resolve_endpoint(Endpoint("http://127.0.0.1:9"))


def test_a_server_without_models(server: StandIn) -> None:
    server.models = []
    with pytest.raises(FatalRequestError, match="lists no models"):
        find_model(Endpoint(server.base_url), None)


@pytest.mark.parametrize(
    "text", ["<html></html>", "{", "[]", "3", '{"data": 3}', '{"data": [3]}', '{"status": "ok"}', ""]
)
def test_something_else_that_answers(server: StandIn, text: str) -> None:
    server.models_text = text
    with pytest.raises(FatalRequestError, match=r"is not OpenAI-compatible|lists no models"):
        find_model(Endpoint(server.base_url), None)


def test_the_key_is_never_shown() -> None:
    assert "secret" not in repr(Endpoint("http://h/v1", api_key="secret"))
