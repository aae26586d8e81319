"""Who may ask."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from roentgen.view.app import make_app
from roentgen.view.library import Library


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(make_app(Library([str(tmp_path)]), lambda: ["right"]), base_url="http://127.0.0.1:8000")


def test_the_token_opens_as_a_parameter_and_as_a_bearer(client: TestClient) -> None:
    assert client.get("/api/sources?token=right").status_code == 200
    assert client.get("/api/sources", headers={"Authorization": "Bearer right"}).status_code == 200


@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong", "?token=righ", "?token=%ff%fe", "?Token=right"])
def test_nothing_is_told_without_the_token(client: TestClient, query: str) -> None:
    for path in ("/", "/api/sources", "/app.js", "/nowhere"):
        reply = client.get(path + query)
        assert reply.status_code == 401
        assert set(reply.json()) == {"error"}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", ""]
)
def test_a_name_that_is_not_this_machines_is_refused_though_the_token_is_right(client: TestClient, host: str) -> None:
    assert client.get("/api/sources?token=right", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:1", "LOCALHOST", "[::1]:8000", "127.0.0.1"])
def test_this_machines_names_are_let_in(client: TestClient, host: str) -> None:
    assert client.get("/api/sources?token=right", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_the_page_is_read_only(client: TestClient, method: str) -> None:
    assert client.request(method, "/api/sources?token=right").status_code == 405


def test_the_browser_is_told_to_load_nothing_from_elsewhere(client: TestClient) -> None:
    for reply in (client.get("/api/sources?token=right"), client.get("/")):
        assert reply.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "http" not in reply.headers["content-security-policy"]
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "path", ["/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/.hidden", "/x/../../app.py", "/%5c..%5capp.py"]
)
def test_no_path_leads_out_of_the_bundle(client: TestClient, path: str) -> None:
    reply = client.get(f"{path}?token=right")
    assert reply.status_code == 404
    assert "Starlette" not in reply.text
