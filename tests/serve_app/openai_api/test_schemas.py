"""The document that describes the routes: every reply and every error of every one, and none that is not sent."""

from typing import Any

import pytest

from serve_app.config import ServerConfig
from serve_app.http.ingress import Ingress


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    ingress = Ingress(None, ServerConfig(), lambda choice: None)  # its routes are only looked at
    return ingress.__serve_build_asgi_app__().openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{method} {path}", op) for path, methods in document["paths"].items() for method, op in methods.items()]


def test_every_route_says_what_it_sends(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        assert "422" not in operation["responses"], name
        for status, response in operation["responses"].items():
            assert response["content"], (name, status)
            assert all(media["schema"] for media in response["content"].values()), (name, status)


def test_errors_are_the_envelope(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        if name != "get /health":
            for status in ("400", "401", "404", "429", "500", "503", "4XX"):
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorReply"}, (name, status)


def test_generation_is_documented_whole_and_streamed(document: dict[str, Any]) -> None:
    for path, name in (("/v1/chat/completions", "ChatCompletion"), ("/v1/completions", "Completion")):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
        assert "[DONE]" in content["text/event-stream"]["schema"]["description"]
