"""Groups samples that are attempts at the same problem, whatever their ids.

Attempts at one problem are not independent evidence: a split that separates them, or an interval that counts them
separately, is wrong. Ids alone do not identify problems. The same question may have two ids, in one file or in two, and
templates (as in GSM-Symbolic) produce questions that differ only in names and numbers. So samples are linked if they share

- an id;
- a question: its words, ignoring case and spacing;
- a template: the recorded one or, if a source is known to use templates and none is recorded, the same wording without
  numbers and names.

A property that all samples share distinguishes nothing and links nothing: attempts at a single question remain as many
problems as there are ids, because no split of them could let a probe recognize the question.
"""

import hashlib
import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

ALIKE = 0.17
"""Minimum share of word pairs (Jaccard) that two questions of a template have in common. Of 700 questions of
reasoning-gym's gsm_symbolic, those of one template share at least 0.21 and those of two at most 0.12."""

CLOSE = 0.5
"""Share above which a question is not compared with later ones: it is like a question that already is."""

_TEMPLATED = re.compile(r"gsm[-_]symbolic", re.IGNORECASE)
_SUFFIX = "Give the result as your final answer. Do not include units."
"""Text at the end of every gsm_symbolic question of reasoning-gym."""

_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2212": "-"})
_WORD = re.compile(r"[^\W\d_]+")

Shingles = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Posed:
    """The problem of a sample, for comparison with others."""

    problem_id: str
    """The problem's id."""
    question: str | None = None
    """The question; None if it is not known."""
    template: str | None = None
    """The question's template; None if it has none or it is unknown."""
    prompt: str | None = None
    """Everything before the answer, if it is unknown which part of it is the question."""

    @property
    def text(self) -> str:
        """The question or, if it is unknown, the prompt."""
        return self.question or self.prompt or ""

    @property
    def templated(self) -> bool:
        """True if the question was made from a template that is not recorded."""
        return self.template is None and bool(_TEMPLATED.match(self.problem_id) or _SUFFIX in self.text)

    def brief(self) -> "Posed":
        """Return a compact copy with hashes instead of texts, where only equality matters."""
        if self.templated:
            return self
        question, prompt = (
            None if words is None else hashlib.sha256(words.encode()).hexdigest()[:16]
            for words in (_words(self.question), _words(self.prompt))
        )
        return Posed(self.problem_id, question, self.template, prompt)


def same_question(posed: Sequence[Posed]) -> list[int]:
    """Number the problems of samples from 0, in the order of their ids: equal numbers mean the same question."""
    return _number(posed, _by_id_and_question(posed))


def same_template(posed: Sequence[Posed]) -> list[int]:
    """Number the groups to keep together in a split or to count once, from 0: problems, and problems that share a template."""
    links = _Links(range(len(posed)))
    for number, first in enumerate(_by_id_and_question(posed)):
        links.join(number, first)
    recorded: list[Hashable | None] = [one.template for one in posed]
    unknown = [number for number, one in enumerate(posed) if one.templated]
    for number, leader in zip(unknown, _alike([posed[number].text for number in unknown]), strict=True):
        recorded[number] = leader
    if len(set(recorded)) > 1:
        links.join_equal(recorded)
    return _number(posed, links.all())


def _by_id_and_question(posed: Sequence[Posed]) -> list[int]:
    links = _Links(range(len(posed)))
    links.join_equal([one.problem_id for one in posed])
    questions, prompts = [_words(one.question) for one in posed], [_words(one.prompt) for one in posed]
    if len(set(questions)) > 1:
        links.join_equal(questions)
    if len(set(prompts) - {None}) > 1:  # a sample without a prompt has a question
        links.join_equal(prompts)
    return links.all()


def _words(text: str | None) -> str | None:
    """Normalize a text for comparison, ignoring case, spacing and typography; None if it has no letter or digit."""
    if text is None:
        return None
    words = " ".join(unicodedata.normalize("NFKC", text).translate(_PLAIN).casefold().split())
    return words if any(map(str.isalnum, words)) else None


def _alike(questions: Sequence[str]) -> list[int]:
    """Return, for each question, the index of the first question with the same wording, ignoring numbers and names.

    Each question is compared with one representative of each wording found so far, so thousands of questions from a hundred
    templates take seconds.
    """
    shingles = _shingles(questions)
    links = _Links(range(len(questions)))
    leaders: dict[Shingles, int] = {}
    for number, own in enumerate(shingles):
        if own in leaders:
            links.join(number, leaders[own])
            continue
        shares = {first: _jaccard(own, other) for other, first in leaders.items()}
        for first, share in shares.items():
            if share >= ALIKE:
                links.join(number, first)
        if max(shares.values(), default=0.0) < CLOSE:
            leaders[own] = number
    return links.all()


def _shingles(questions: Sequence[str]) -> list[Shingles]:
    """Return each question's pairs of successive words, without names, numbers and the words that all questions begin or
    end with."""
    words = [_WORD.findall(question.replace(_SUFFIX, "")) for question in questions]
    distinct = {tuple(one) for one in words}
    start = _shared(distinct) if len(distinct) > 1 else 0
    stop = _shared([one[::-1] for one in distinct]) if len(distinct) > 1 else 0
    plain = [[word for word in one[start : len(one) - stop] if word[0].islower()] for one in words]
    return [frozenset(pairwise(one)) for one in plain]


def _shared(texts: Iterable[tuple[str, ...]]) -> int:
    """Return the number of words that all texts begin with."""
    low, high = min(texts), max(texts)
    return next(
        (place for place, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high))
    )


def _jaccard(one: Shingles, other: Shingles) -> float:
    return len(one & other) / len(one | other) if one or other else 1.0


def _number(posed: Sequence[Posed], firsts: Sequence[int]) -> list[int]:
    """Number groups in the order of their smallest id."""
    least: dict[int, str] = {}
    for one, first in zip(posed, firsts, strict=True):
        least[first] = min(one.problem_id, least.get(first, one.problem_id))
    order = {first: number for number, first in enumerate(sorted(least, key=lambda first: (least[first], first)))}
    return [order[first] for first in firsts]


class _Links:
    """Disjoint sets of indices (union-find), each named by one of its members."""

    def __init__(self, places: Iterable[int]) -> None:
        self._parent = list(places)

    def join(self, one: int, other: int) -> None:
        """Merge two sets."""
        one, other = self.find(one), self.find(other)
        self._parent[max(one, other)] = min(one, other)

    def join_equal(self, keys: Sequence[Hashable | None]) -> None:
        """Merge the sets of all indices with the same key, ignoring None."""
        firsts: dict[Hashable, int] = {}
        for place, key in enumerate(keys):
            if key is not None:
                self.join(place, firsts.setdefault(key, place))

    def find(self, place: int) -> int:
        """Return the representative of an index's set."""
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place

    def all(self) -> list[int]:
        """Return the representative of every index's set."""
        return [self.find(place) for place in range(len(self._parent))]
