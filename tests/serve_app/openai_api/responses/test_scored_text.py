from serve_app.openai_api.responses.scored_text import ScoredText
from serve_app.openai_api.schemas import ChosenToken


def tokens(*pieces: bytes) -> list[ChosenToken]:
    return [
        {"token": piece.decode("utf-8", "replace"), "logprob": -1.0, "bytes": list(piece), "top_logprobs": []}
        for piece in pieces
    ]


def texts(found: list[ChosenToken]) -> list[bytes]:
    return [bytes(token["bytes"]) for token in found]


def test_tokens_come_with_the_text_that_begins_with_them() -> None:
    scored = ScoredText()
    scored.add(tokens(b"<think>", b"yes", b"</think>", b"\n\n", b"y", b"es", b" \xc3", b"\xa9"))
    start = scored.find("yes", after="</think>")
    assert start == len("<think>yes</think>\n\n")
    assert texts(scored.take(start, start + 1)) == [b"y"]
    assert texts(scored.take(start, start + len("yes é"))) == [b"es", b" \xc3", b"\xa9"]
    scored.add(tokens(b"\n<tool_call>"))
    assert scored.take(start, start + len("yes é")) == []


def test_text_that_is_not_there_begins_where_it_may() -> None:
    scored = ScoredText()
    scored.add(tokens(b"</think>", b"abc"))
    assert scored.find("xyz", after="</think>") == len("</think>")
    assert scored.find("abc", after="<none>") == len("</think>")
