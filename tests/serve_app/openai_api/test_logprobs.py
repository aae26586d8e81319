"""Log-probabilities of completions: the token that came is among the alternatives, and offsets count characters."""

from serve_app.engines.protocol import TokenScore
from serve_app.openai_api.logprobs import Offsets, completion_logprobs
from tests.serve_app import tiny

WORDS = tiny.tokenizer()


def test_the_token_that_came_is_among_the_alternatives() -> None:
    a, b, c = (WORDS(letter)["input_ids"][0] for letter in "abc")
    scores = [TokenScore(-3.0, ((b, -0.1), (c, -2.5))), TokenScore(-0.1, ((b, -0.1), (c, -2.5))), TokenScore(-1.0)]
    found = completion_logprobs(WORDS, [a, b, c], [None, *scores][1:], Offsets())
    assert found["top_logprobs"] == [{"b": -0.1, "c": -2.5, "a": -3.0}, {"b": -0.1, "c": -2.5}, {"c": -1.0}]
    assert found["token_logprobs"] == [-3.0, -0.1, -1.0]


def test_offsets_of_chunks_are_those_of_the_whole() -> None:
    ids = list(WORDS("a🙂b", add_special_tokens=False)["input_ids"])
    offsets = Offsets()
    chunks = [completion_logprobs(WORDS, ids[i : i + 2], [TokenScore(0.0)] * 2, offsets) for i in (0, 2, 4)]
    assert [at for chunk in chunks for at in chunk["text_offset"]] == [0, 1, 1, 1, 1, 2]
