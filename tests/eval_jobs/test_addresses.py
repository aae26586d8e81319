"""Several addresses of one server are used in turn and lost ones skipped, over real sockets."""

import socket

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_jobs.addresses import Addresses, split
from eval_jobs.endpoint import Endpoint, find_model
from eval_jobs.settings import SettingsError, check_settings
from tests.eval_jobs.stand_in import StandIn


@given(st.lists(st.integers(1, 65535), min_size=1, max_size=5))
def test_a_list_of_addresses_is_read(ports: list[int]) -> None:
    urls = [f"http://10.0.0.1:{port}/v1" for port in ports]
    assert split(" , ".join(urls) + "/,") == tuple(urls)


@pytest.mark.parametrize(
    ("given", "words"),
    [("", "''"), ("http://a/v1,b/v1", "'b/v1'"), ("http://a/v1,http://b", "different paths"), ("ftp://a", "'ftp://a'")],
)
def test_what_is_not_a_list_of_addresses_is_named(given: str, words: str) -> None:
    with pytest.raises(SettingsError, match=f"--base-url: .*{words}"):
        check_settings(base_url=given)


def unused() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


async def test_requests_take_turns_and_a_lost_address_is_passed_by(server: StandIn) -> None:
    lost = unused()
    async with httpx2.AsyncClient(transport=Addresses([server.base_url, lost])) as client:
        answers, failures = 0, 0
        for _ in range(10):
            try:
                answers += (await client.get(f"{lost}/models")).status_code == 200
            except httpx2.ConnectError:
                failures += 1
    assert (answers, failures) == (9, 1)


async def test_if_all_are_lost_they_are_still_tried(server: StandIn) -> None:
    urls = [unused(), unused()]
    async with httpx2.AsyncClient(transport=Addresses(urls)) as client:
        for _ in range(5):
            with pytest.raises(httpx2.ConnectError):
                await client.get(f"{urls[0]}/models")


async def test_the_client_finishes_although_the_first_address_is_lost(server: StandIn) -> None:
    endpoint = Endpoint(f"{unused()},{server.base_url}")
    assert find_model(endpoint, None).id == "stand-in"
    client = endpoint.client()
    for _ in range(4):
        assert [model.id async for model in client.models.list()] == ["stand-in"]
    await client.close()
