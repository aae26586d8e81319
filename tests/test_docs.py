"""The pages agree with one another and with the tree: links, the index, the glossary, paths, and the targets of make."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md"]
CODE = [file for name in ("roentgen", "serve_app", "eval_jobs", "probes") for file in (ROOT / name).rglob("*.py")]
CODE_BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
TERM = re.compile(r"- \*\*(.+?)\*\*: .+\.")


@cache
def text_of(page: Path) -> str:
    """A page without its code blocks."""
    return CODE_BLOCK.sub("", page.read_text())


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    listed = {(index.parent / path).resolve() for path in re.findall(r"\]\(([^)#\s]+)", text_of(index))}
    assert listed.issuperset(set((ROOT / "docs").rglob("*.md")) - {index})
    assert "(docs/index.md)" in (ROOT / "README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def plain(text: str) -> str:
    """A text in lower case, in which names of the code are words."""
    return " ".join(re.sub(r"[-_]", " ", text).split()).lower()


def test_the_glossary_has_a_line_for_each_term_and_each_is_used() -> None:
    glossary = ROOT / "docs" / "glossary.md"
    lines = [line for line in glossary.read_text().splitlines() if line.startswith("- ")]
    terms = [found[1] for line in lines if (found := TERM.fullmatch(line))]
    assert len(terms) == len(lines) > 40
    assert terms == sorted(set(terms), key=str.lower)
    text = "\n".join([text_of(page) for page in PAGES if page != glossary] + [file.read_text() for file in CODE])
    used = plain(text)
    assert [term for term in terms if not re.search(rf"\b{re.escape(plain(term))}", used)] == []


def test_paths_in_contributing_are_there() -> None:
    named = set(re.findall(r"`([\w./]+/[\w./]*)`", text_of(ROOT / "CONTRIBUTING.md")))
    assert len(named) > 20
    templates = ("probes/kinds/NAME.py", "serve_app/engines/NAME/")
    assert [path for path in sorted(named) if path not in templates and not (ROOT / path).exists()] == []


def test_what_make_test_leaves_out_is_said() -> None:
    targets = set(re.findall(r"^(test-\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    own = targets - {"test-units", "test-servers"}
    assert own == set(re.findall(r"\btest-\w+", (ROOT / "README.md").read_text()))
    assert own <= set(re.findall(r"\btest-\w+", (ROOT / "CONTRIBUTING.md").read_text()))


def test_the_workflow_calls_the_targets_that_ci_does() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())["jobs"]
    called = set(jobs["make"]["strategy"]["matrix"]["target"]) | {"test-cluster"}
    assert any(step.get("run", "").endswith("make test-cluster") for step in jobs["cluster"]["steps"])
    assert called - {"check"} == set(re.findall(r"^make (.+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
