from dataclasses import replace
from typing import Any

import pytest

from roentgen.contract import RolloutKey
from roentgen.tokenized_text import Segment, TokenizedText
from roentgen.transcripts import KnownTokens, Transcript
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.teacher_forcing.tokens import UnreadableTextError, transcript_tokenizer
from tests.serve_app import tiny

KEY = RolloutKey(config_hash="c", problem_id="p")
ASK = ({"role": "user", "content": "hi"},)


@pytest.fixture
def model(llama: LoadedModel) -> LoadedModel:
    """The tiny model with a tokenizer that a test may change."""
    return replace(llama, tokenizer=tiny.tokenizer())


def display_name(text: TokenizedText) -> str:
    """Read the tokens back: token i is byte i in the alphabet's order, so this is the tokenizer's own decoding."""
    return tiny.tokenizer().decode(text.token_ids)


def test_a_conversation_goes_through_the_template_and_ends_its_turn(model: LoadedModel) -> None:
    text = transcript_tokenizer(model)(Transcript(KEY, ASK, "yo", "stop")).sequence
    assert display_name(text) == text.text == "[user]hi[reply]yo<eos>"
    assert (text.n_prompt, text.n_completion, text.n_rows) == (15, 3, 17)
    assert text.segments == [Segment("user", 0, 8), Segment("assistant", 15, 22)]
    assert text.token_offsets == list(range(18))


def test_a_cut_completion_does_not_end(model: LoadedModel) -> None:
    assert transcript_tokenizer(model)(Transcript(KEY, ASK, "yo", "length")).sequence.text == "[user]hi[reply]yo"


def test_without_completion_all_is_prompt_ready_for_the_answer(model: LoadedModel) -> None:
    text = transcript_tokenizer(model)(Transcript(KEY, ASK)).sequence
    assert text.text == "[user]hi[reply]"
    assert text.n_prompt == text.n_rows == len(text.token_ids) == 15


def test_an_empty_answer_is_only_the_end(model: LoadedModel) -> None:
    text = transcript_tokenizer(model)(Transcript(KEY, ASK, "", "stop")).sequence
    assert (text.n_completion, text.n_rows) == (1, text.n_prompt)


def test_the_end_of_a_turn_is_the_templates_own(model: LoadedModel) -> None:
    """Several tokens end a text; the template says which of them ends a turn."""
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    model.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<turn>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turn = model.tokenizer.convert_tokens_to_ids("<turn>")
    both = type("TwoEnds", (LoadedModel,), {"eos_token_ids": frozenset({tiny.EOS, turn})})
    model = both(**{name: getattr(model, name) for name in model.__dataclass_fields__})
    assert transcript_tokenizer(model)(Transcript(KEY, ASK, "yo", "stop")).sequence.token_ids[-1] == turn
    assert transcript_tokenizer(model)(Transcript(KEY, "raw", "yo", "stop")).sequence.token_ids[-1] == tiny.EOS


def test_raw_text_begins_as_the_tokenizer_begins_texts(model: LoadedModel) -> None:
    plain = transcript_tokenizer(model)(Transcript(KEY, "abc", "d")).sequence
    assert (plain.text, plain.n_prompt, plain.n_completion) == ("abcd", 3, 1)
    assert plain.segments == [Segment("prompt", 0, 3), Segment("completion", 3, 4)]

    from tokenizers.processors import TemplateProcessing

    model.tokenizer.bos_token = "<eos>"
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tiny.EOS)]
    )
    begun = transcript_tokenizer(model)(Transcript(KEY, "abc", "d")).sequence
    assert (begun.text, begun.n_prompt, begun.n_completion) == ("<eos>abcd", 4, 1)
    assert begun.token_ids == [tiny.EOS, *plain.token_ids]
    assert begun.token_offsets == [0, 5, 6, 7, 8]


def test_prompt_and_completion_share_no_token(model: LoadedModel) -> None:
    """A token "bc" exists; where the prompt ends with b and the completion begins with c, generation could not use it."""
    from tokenizers import Tokenizer, models

    core = model.tokenizer.backend_tokenizer
    vocabulary = dict(core.get_vocab())
    vocabulary.pop("<eos>")
    merged = Tokenizer(models.BPE(vocab={**vocabulary, "bc": 300}, merges=[("b", "c")]))
    merged.pre_tokenizer, merged.decoder = core.pre_tokenizer, core.decoder
    model.tokenizer._tokenizer = merged
    assert 300 in transcript_tokenizer(model)(Transcript(KEY, "abc", "d")).sequence.token_ids
    apart = transcript_tokenizer(model)(Transcript(KEY, "ab", "cd")).sequence
    assert (300 in apart.token_ids, apart.n_prompt, apart.n_completion) == (False, 2, 2)


def test_known_tokens_are_taken_for_the_same_weights_only(model: LoadedModel) -> None:
    known = KnownTokens("tiny-llama", "0", TokenizedText("ab", [1, 2, 3], [0, 0, 1], [Segment("user", 0, 1)], 2))
    same = transcript_tokenizer(model)(Transcript(KEY, ASK, "yo", "stop", tokens=known))
    assert (same.sequence, same.exact) == (known.sequence, True)
    other = transcript_tokenizer(model)(Transcript(KEY, ASK, "yo", "stop", tokens=replace(known, revision="1")))
    assert (other.sequence.text, other.exact) == ("[user]hi[reply]yo<eos>", False)


def test_a_text_longer_than_the_context_is_refused_with_both_numbers(model: LoadedModel) -> None:
    with pytest.raises(UnreadableTextError, match=r"129 tokens; the context of tiny-llama is 128"):
        transcript_tokenizer(model)(Transcript(KEY, "x" * 129))
    assert transcript_tokenizer(model)(Transcript(KEY, "x" * 128)).sequence.n_rows == 128


@pytest.mark.parametrize(
    "transcript",
    [
        Transcript(KEY, "half \ud83d"),
        Transcript(KEY, "whole", "half \ud83d"),
        Transcript(KEY, ({"role": "user", "content": "half \ud83d"},), "whole"),
        Transcript(KEY, ASK, "half \ud83d", "stop"),
    ],
)
def test_half_a_surrogate_pair_is_refused(model: LoadedModel, transcript: Any) -> None:
    with pytest.raises(UnreadableTextError, match="an unpaired surrogate"):
        transcript_tokenizer(model)(transcript)


def test_what_the_template_cannot_say_is_refused(model: LoadedModel) -> None:
    with pytest.raises(UnreadableTextError, match=r"role"):
        transcript_tokenizer(model)(Transcript(KEY, ({"role": "robot", "content": "hi"},), "yo"))
    model.tokenizer.chat_template = None
    with pytest.raises(UnreadableTextError, match=r"tiny-llama has no chat template"):
        transcript_tokenizer(model)(Transcript(KEY, ASK, "yo"))
