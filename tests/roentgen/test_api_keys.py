"""A server accepts each key of the variable, a client sends the first."""

import pytest

from roentgen.api_keys import VARIABLE, api_keys, client_key


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (None, []),
        ("", []),
        (" , ", []),
        ("one", ["one"]),
        (" first, second ,", ["first", "second"]),
        (",late", ["late"]),
    ],
)
def test_the_keys_of_the_environment(text: str | None, keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(VARIABLE, text)
    assert api_keys() == keys
    assert client_key() == (keys[0] if keys else "none")


def test_the_keys_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "here")
    assert api_keys("there, also") == ["there", "also"]
    assert client_key("") == "none"
