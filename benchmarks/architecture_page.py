"""Writes the results of `benchmarks.architectures` into docs/architectures.md, between its markers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.architecture_cases import COLUMNS, refusal

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


@dataclass(frozen=True)
class ArchitectureFinding:
    """The result of a case."""

    case: str
    """A model type and options."""
    cells: tuple[str, ...] = ()
    """Wording for each hook point; empty if the configuration alone does not suffice."""
    unresolved: str = ""
    """Why it does not."""
    not_built: str = ""
    """Why no narrow model generates: transformers builds none, or it took too long."""
    refused: str = ""
    """Why the server refuses the model."""
    batches: str = ""
    """Which requests may share a forward."""
    reason: str = ""
    """Why not any."""
    joins: bool = False
    """Whether requests join and leave a running batch."""
    error: float = 0.0
    """Of the log-probabilities, at most."""
    wrong: str = ""
    """Error of the engine's generation."""
    note: str = ""
    """How transformers' own generate differs."""

    @property
    def name(self) -> str:
        """The case as the page writes it."""
        return " ".join(f"`{part}`" for part in self.case.split())

    @property
    def last_cell(self) -> str:
        """Wording for batches."""
        if self.refused:
            return refusal(self.refused)
        if self.wrong and not self.batches:
            return "fails"
        return self.batches or ("not tried" if self.not_built.startswith("not tried") else "not built")

    def line(self) -> str:
        """Return it as a line of text."""
        hook_points = self.unresolved or ", ".join(f"{n} {c}" for n, c in zip(COLUMNS, self.cells, strict=True))
        kind = f"{self.batches}, {'continuous' if self.joins else 'static'}, off by {self.error:.1e}"
        found = self.refused or self.not_built or f"{kind}\t{self.reason}\t{self.wrong}\t{self.note}"
        return f"{self.case}\t{self.last_cell}\t{found}\t{hook_points}"


def hook_point_table(findings: Sequence[ArchitectureFinding]) -> str:
    """Lay out a row per case that is resolved from its configuration alone."""
    head = ["model type", *(f"`{name}`" for name in COLUMNS), "batches"]
    rows = [[f.name, *f.cells, f.last_cell] for f in findings if f.cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def exceptions(findings: Sequence[ArchitectureFinding]) -> str:
    """List the cases that are refused, run in narrower batches, or could not be tried, with the reasons."""
    run = [f for f in findings if f.batches]
    static = [f for f in run if f.batches == "any" and not f.joins]
    joins = [f for f in run if f.batches == "any" and f.joins]
    parts = [
        f"{len(findings)} cases were tried. {len(run)} generate. In {len(joins)} of them, any requests share a forward, and "
        "join and leave it at any step.",
        f"In {len(static)}, any requests share a forward, but a batch is filled once, since the cache is more than keys and "
        f"values: {', '.join(f.name for f in static)}.",
    ]
    lists: list[tuple[str, Callable[[ArchitectureFinding], str]]] = [
        (
            "Only some requests share a forward:",
            lambda f: f"{f.batches}; {f.reason}" if f.batches not in ("", "any") else "",
        ),
        ("The server refuses:", lambda f: f.refused),
        ("What the engine generates is not what one forward over it gives:", lambda f: f.wrong),
        (
            "Log-probabilities are right, but there is a difference to transformers:",
            lambda f: f.note if f.batches else "",
        ),
        ("Not resolved from the configuration alone:", lambda f: f.unresolved),
        ("Not tried in the engine, as no narrow model could be built:", lambda f: f.not_built),
    ]
    for title, why in lists:
        reasons: dict[str, list[str]] = {}
        for finding in findings:
            if reason := why(finding):
                reasons.setdefault(_shorter(reason), []).append(finding.name)
        if reasons:
            parts.append(title)
            parts.append("\n".join(f"- {', '.join(names)}: {_escape(reason)}" for reason, names in reasons.items()))
    return "\n\n".join(parts)


def rewrite(page: str, findings: Sequence[ArchitectureFinding]) -> str:
    """Return the page with everything between its markers made anew."""
    for name, body in (("table", hook_point_table(findings)), ("exceptions", exceptions(findings))):
        begin, end = f"<!-- {name}: made by python -m benchmarks.architectures --docs -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        page, found = pattern.subn(lambda _, body=body, begin=begin, end=end: f"{begin}\n\n{body}\n\n{end}", page)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"the page has {found} sections between the markers of {name}")
    return page


SHORTER = {
    r"^the configuration alone is not enough; give the weights: ": "",
    r"^\w+ (?=is not a causal|does|keeps|has|cannot)|^[\w-]+ (?=is an encoder)": "it ",
    r" \(by up to \d+% of their norm\)|: passing them changes rows by \d+% of their norm": "",
    r"a row differs by inf of its norm": "it does not run",
    r"a row differs by \S+ of its norm": "a row differs",
}
"""Parts of a reason that are omitted, because they differ between models with the same reason or between runs."""


def _shorter(reason: str) -> str:
    for pattern, text in SHORTER.items():
        reason = re.sub(pattern, text, reason)
    return reason


def _escape(reason: str) -> str:
    return reason.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
