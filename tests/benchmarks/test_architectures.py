"""What docs/architectures.md says of batches is what a narrow model of the case does; the page is made from findings."""

import dataclasses

import pytest

from benchmarks.architecture_cases import COLUMNS, cases, configuration, refusal
from benchmarks.architecture_page import PAGE, ArchitectureFinding, exceptions, hook_point_table, rewrite
from benchmarks.architectures import try_case

LLAMA = ArchitectureFinding("llama", ("✓",) * len(COLUMNS), batches="any", joins=True)
BERT = dataclasses.replace(
    LLAMA, case="bert is_decoder=True", batches="", refused="BertLMHeadModel is not a causal decoder: x"
)
BLT = ArchitectureFinding("blt", unresolved="its widths_depend", not_built="not tried: more than 100 s")


@pytest.mark.parametrize(
    "case",
    [
        "llama",
        "bert",
        "phi3 rope_type='longrope'",
        "openai-gpt",
        "rwkv hidden_size=32 attention_hidden_size=32 vocab_size=512",
    ],
)
def test_the_page_says_what_a_case_does(case: str) -> None:
    *_, found = try_case(case)
    assert not found.wrong
    page = PAGE.read_text()
    if found.cells:
        assert hook_point_table([found]).splitlines()[-1] in page
    else:
        assert any(line.startswith("- ") and found.name in line for line in page.splitlines())
    assert found.last_cell == {"llama": "any", "bert": "reads ahead", "openai-gpt": "no cache", "rwkv": "alone"}.get(
        case.split()[0], "one side of a limit"
    )


def test_every_case_is_on_the_page() -> None:
    page = PAGE.read_text()
    assert [case for case in cases() if ArchitectureFinding(case).name not in page] == []


def test_options_come_before_what_is_given_beside_them() -> None:
    assert configuration("llama num_hidden_layers=2", num_hidden_layers=6).num_hidden_layers == 2
    assert configuration("llama", num_hidden_layers=6).num_hidden_layers == 6


def test_a_reason_has_words() -> None:
    assert refusal("GPTModel keeps no cache of past tokens") == "no cache"
    assert refusal("something new") == "refused"


def test_a_page_is_made_from_findings() -> None:
    markers = PAGE.read_text()
    page = rewrite(markers, [LLAMA, BERT, BLT])
    assert f"| `llama` | {'✓ | ' * len(COLUMNS)}any |" in page
    assert f"| `bert` `is_decoder=True` | {'✓ | ' * len(COLUMNS)}reads ahead |" in page
    assert "| `blt`" not in page
    assert "`gpt2`" not in page[page.index("<!-- table") :]
    assert "- `blt`: its widths\\_depend" in exceptions([BLT])
    assert rewrite(page, [LLAMA, BERT, BLT]) == page
    with pytest.raises(ValueError, match="markers of table"):
        rewrite("no markers", [LLAMA])
