"""The key reaches the server byte by byte, and a failure says what the server answered."""

import pytest
from httpx2 import Client, HTTPError, MockTransport, Request, Response

from roentgen.http_client import connect, explain


def test_a_key_of_any_characters_is_sent_as_utf_8() -> None:
    with connect("http://h/v1", "ключ", 1) as client:
        assert client.headers.raw[-1] == (b"Authorization", "Bearer ключ".encode())


def answering(status: int) -> Client:
    return Client(transport=MockTransport(lambda _: Response(status, text="why it is so")))


def lost(request: Request) -> Response:
    raise HTTPError("")


@pytest.mark.parametrize(
    ("client", "text"),
    [
        (answering(401), "answers 401: the API key is missing or wrong; set ROENTGEN_API_KEY to the server's key"),
        (answering(403), "answers 403: why it is so"),
        (answering(302), "answers 302: why it is so"),
        (Client(transport=MockTransport(lost)), "fails: HTTPError"),
    ],
)
def test_a_failure_says_what_the_server_answered(client: Client, text: str) -> None:
    with pytest.raises(HTTPError) as failed:
        client.get("http://h/").raise_for_status()
    assert explain(failed.value) == text
