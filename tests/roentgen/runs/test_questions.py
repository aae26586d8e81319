"""Which samples are attempts at one problem: by id, by words, by template."""

import pytest

from eval_jobs.problems import read_source
from roentgen.runs import Posed, same_question, same_template
from tests.eval_jobs.conftest import take

ONE, OTHER = "Tom has 3 apples. How many?", "Ann has 4 pears. How many?"


def test_the_same_words_are_the_same_question_under_any_id() -> None:
    asked = [Posed("b", ONE), Posed("a", OTHER), Posed("c", "  tom has 3\u00a0APPLES.\nHow many? "), Posed("a", OTHER)]
    assert same_question(asked) == same_template(asked) == [1, 0, 1, 0]


def test_questions_that_differ_in_a_sign_or_a_digit_are_others() -> None:
    asked = [Posed(str(i), text) for i, text in enumerate(["1 + 1?", "1 - 1?", "1 + 2?", "11?", "1 + 1 ?"])]
    assert same_template(asked) == [0, 1, 2, 3, 4]


def test_what_all_share_tells_none_apart() -> None:
    assert same_template([Posed(str(i), ONE) for i in range(3)]) == [0, 1, 2]
    assert same_template([Posed(str(i), ONE, "t") for i in range(3)]) == [0, 1, 2]
    assert same_template([Posed(str(i), "?") for i in range(3)]) == [0, 1, 2]
    asked = [Posed("a", "?"), Posed("b", prompt="Go"), Posed("c", prompt="Go")]
    assert same_template(asked) == [0, 1, 2]
    assert same_template([*asked, Posed("d", prompt="Stop")]) == [0, 1, 1, 2]


def test_links_add_up() -> None:
    """a and b share words, b and c an id, c and d a template."""
    asked = [Posed("a", ONE), Posed("b", ONE), Posed("b", OTHER, "t"), Posed("d", "Else?", "t"), Posed("e", "Not.")]
    assert same_template(asked) == [0, 0, 0, 0, 1]
    assert same_question(asked) == [0, 0, 0, 1, 2]


def test_hashes_link_as_the_texts_do() -> None:
    asked = [Posed("a", ONE), Posed("b", ONE + " "), Posed("c", OTHER), Posed("d", "?"), Posed("e", prompt=ONE)]
    assert same_template([one.brief() for one in asked]) == same_template(asked) == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("wrap", ["{}", "Reason step by step, then answer.\n\n{}\n\nEnd with a line Answer: [number]."])
def test_templates_are_found_where_none_is_recorded(wrap: str) -> None:
    """Groups by wording are the templates that the generator used."""
    problems = take("gsm-symbolic", 150)
    assert len({problem.template for problem in problems}) > 50
    recorded = same_template([Posed(p.problem_id, p.question, p.template) for p in problems])
    found = same_template([Posed(p.problem_id, wrap.format(p.question)) for p in problems])
    assert found == recorded
    assert len(set(recorded)) == len({problem.template for problem in problems})
    assert same_question([Posed(p.problem_id, p.question, p.template) for p in problems]) == list(range(150))
    assert next(read_source("gsm-symbolic")).template == problems[0].template


def test_generated_sums_are_problems_of_their_own() -> None:
    problems = take("arithmetic", 60)
    assert same_template([Posed(p.problem_id, p.question) for p in problems]) == list(range(60))
