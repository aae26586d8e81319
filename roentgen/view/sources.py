"""An open run or session: what is known of it, and its samples, whose rollouts are found in the store.

A run's samples are those of its record; their rollouts lie in sessions, one or several. A session without its run has its
rollouts as samples, which have labels and no verdicts.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from roentgen.contract import execution_order, split_key
from roentgen.linear_probe import CARDS, ProbeCard, SavedProbe, SavedProbeError, load_probe, read_cards
from roentgen.model_names import cache_folder
from roentgen.runs import Posed, Run, RunError, Sample, same_template
from roentgen.runs.failures import Failures
from roentgen.runs.record import is_being_recorded
from roentgen.statistics import accuracy
from roentgen.store import Session
from roentgen.view.catalog import Found, local_run
from roentgen.view.errors import ViewError
from roentgen.view.run_table import RunTable
from roentgen.view.schemas import Interval, Key, Overview, Probe, Source
from roentgen.view.session_table import SessionTable
from roentgen.view.table import VERSION, Table

_SHARDS_ASKED = 8
"""Shards of a session that are asked which keys they have."""


@dataclass(frozen=True, eq=False)
class StoredRollout:
    """A rollout, and the session that it is in."""

    table: SessionTable
    """The session's table."""
    place: dict[str, Any]
    """Where its rows are, and how many tokens it has: the columns `LOCATION` of the index."""

    @property
    def session(self) -> Session:
        """The open session."""
        return self.table.session

    @property
    def rollout_id(self) -> str:
        """Its name in the session."""
        return str(self.place["rollout_id"])

    @property
    def n_tokens(self) -> int:
        """Tokens, the last one included, which has no row."""
        return int(self.place["n_prompt"] + self.place["n_completion"])

    @cached_property
    def row(self) -> dict[str, Any]:
        """Its row of the index, text and tokens included; read when it is looked at."""
        return self.table.index_row(self.rollout_id)

    @property
    def frame(self) -> pd.DataFrame:
        """The place as a table, for reading activations."""
        return pd.DataFrame([self.place])

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that it has rows of."""
        return self.session.spec(self.place["shard"]).keys


class OpenSource(ABC):
    """What can be asked of a run or a session."""

    def __init__(self, found: Found, table: Table) -> None:
        self.found = found
        self.table: Table = table

    @abstractmethod
    def describe(self) -> Source:
        """Return its line in the list."""

    @abstractmethod
    def config(self) -> dict[str, Any] | None:
        """Return how it was made, as recorded."""

    @abstractmethod
    def summary(self) -> dict[str, Any] | None:
        """Return what its samples come to; None of what has no verdicts."""

    @abstractmethod
    def stored_keys(self) -> list[Key]:
        """Return the stored keys, in the order in which a model computes them."""

    @abstractmethod
    def probe_folders(self) -> list[Path]:
        """Return the folders of saved probes and of what was found when they were trained."""

    @abstractmethod
    def place_of(self, sample_id: str) -> int:
        """Return the place of a sample in the table.

        Raises:
            ViewError: 404 if there is none.
        """

    @abstractmethod
    def rollout(self, sample_id: str, turn: int) -> StoredRollout:
        """Return the rollout of a turn of a sample.

        Raises:
            ViewError: 404 if there is none.
            StoreError: if it cannot be read.
        """

    def cards(self) -> dict[str, ProbeCard]:
        """Return the cards of the saved probes, by LABEL/NAME; folders without any are passed over."""
        found: dict[str, ProbeCard] = {}
        for folder in self.probe_folders():
            try:
                found |= {f"{folder.name}/{name}": card for name, card in read_cards(folder).items()}
            except SavedProbeError:
                continue
        return found

    def probe(self, name: str) -> SavedProbe:
        """Return a saved probe.

        Raises:
            ViewError: 404 if there is none.
        """
        label, _, own = name.partition("/")
        for folder in self.probe_folders():
            if folder.name == label:
                try:
                    return load_probe(folder, own)
                except SavedProbeError as error:
                    raise ViewError(str(error), 404) from error
        raise ViewError(f"there are no probes of {label!r}", 404)

    def overview(self, lens: str | None) -> Overview:
        """Return all that is known of it but its samples.

        Args:
            lens: why there is no logit lens; None if there is one.
        """
        cards = self.cards()
        probes: list[Probe] = [
            {"name": name, "key": card.key, "label": card.label, "classes": list(card.classes)}
            for name, card in cards.items()
        ]
        return {
            "source": self.describe(),
            "config": self.config(),
            "summary": self.summary(),
            "keys": self.stored_keys(),
            "columns": self.table.columns(),
            "probes": probes,
            "reports": [folder.name for folder in self.probe_folders() if (folder / "results.json").exists()],
            "directions": [name for name, card in cards.items() if card.target != "classes"],
            "lens": lens,
        }


class OpenSession(OpenSource):
    """A session of a store."""

    table: SessionTable

    def __init__(self, found: Found) -> None:
        self.session = Session.open(found.place)
        super().__init__(found, SessionTable(_table_file(found), self.session))

    def describe(self) -> Source:  # noqa: D102 - as OpenSource's
        place = self.found.place
        identity = json.loads(place.read("session.json"))
        spec = next(iter(self._specs()), None)
        return {
            **_unknown(self.found),
            "name": str(identity.get("name", self.found.name)),
            "model": None if spec is None else spec[0],
            "created": str(identity.get("created")),
            "n_samples": self.table.count(),
            "complete": True,
            "bytes": sum(entry.size for entry in place.child("shards").entries()),
        }

    def config(self) -> dict[str, Any] | None:  # noqa: D102
        return None

    def summary(self) -> dict[str, Any] | None:  # noqa: D102
        return None

    def stored_keys(self) -> list[Key]:  # noqa: D102
        widths: dict[str, int] = {}
        for _, own in self._specs():
            widths |= own
        return _keys(widths)

    def probe_folders(self) -> list[Path]:  # noqa: D102
        return []

    def place_of(self, sample_id: str) -> int:  # noqa: D102
        place = self.table.place(sample_id)
        if place < 0:
            raise ViewError(f"{self.found.name} has no rollout {sample_id!r}", 404)
        return place

    def rollout(self, sample_id: str, turn: int) -> StoredRollout:  # noqa: D102
        place = self.table.locate(sample_id)
        if place is None:
            self.table.refresh()
            place = self.table.locate(sample_id)
        if place is None:
            raise ViewError(f"{self.found.name} has no rollout {sample_id!r}", 404)
        return StoredRollout(self.table, place)

    def _specs(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield the model of some shards, and the width of each key."""
        names = [name for (name,) in self.table.query("SELECT DISTINCT shard FROM samples ORDER BY shard").fetchall()]
        for name in names[:: max(1, len(names) // _SHARDS_ASKED)]:
            shard = self.session.shard(name)
            widths = {key: int(shape[-1]) if shape else 1 for key, _, shape in shard.layout if key in shard.spec.keys}
            yield shard.spec.model, widths


class OpenRun(OpenSource):
    """A run."""

    table: RunTable

    def __init__(self, found: Found, sessions: Callable[[str], OpenSession]) -> None:
        """Open a run.

        Args:
            found: where it is.
            sessions: opens the session at an address.
        """
        self.run = Run(local_run(found))
        self._sessions = sessions
        super().__init__(found, RunTable(_table_file(found), self.run))

    def describe(self) -> Source:  # noqa: D102
        config, summary = self.run.config, self._summary_if_true()
        problems = config.problems
        expected = summary.get("expected_samples") if summary else None
        if expected is None and problems.get("samples") is not None:
            expected = problems["samples"] * problems.get("epochs", 1) * max(1, len(config.variants))
        return {
            **_unknown(self.found),
            "model": config.hashed.get("model"),
            "problems": problems.get("source"),
            "created": config.created,
            "n_samples": self.table.count(),
            "expected": expected,
            "complete": bool(summary and summary.get("complete")),
            "accuracy": self.accuracy(),
            "live": is_being_recorded(self.run.record_path),
        }

    def config(self) -> dict[str, Any] | None:  # noqa: D102
        return self.run.config.model_dump(mode="json")

    def accuracy(self) -> Interval | None:
        """Return the share of correct samples so far, clustered by problem; None before there is one."""
        judged = self.table.query(
            "SELECT problem, verdict = 'correct' FROM samples WHERE verdict IN ('correct', 'wrong', 'no_answer')"
        ).fetchall()
        if not judged:
            return None
        posed = self.table.query(
            "SELECT problem, any_value(question), any_value(template) FROM lines WHERE error IS NULL "
            "GROUP BY problem ORDER BY problem"
        ).fetchall()
        briefs = [Posed(problem, question, template).brief() for problem, question, template in posed]
        clusters = dict(zip((one.problem_id for one in briefs), same_template(briefs), strict=True))
        found = accuracy([bool(correct) for _, correct in judged], [clusters[problem] for problem, _ in judged])
        return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}

    def summary(self) -> dict[str, Any] | None:  # noqa: D102
        return self._summary_if_true() or self._so_far()

    def stored_keys(self) -> list[Key]:  # noqa: D102
        widths: dict[str, int] = {}
        for sample in self._some_samples():
            for ref in sample.rollouts:
                widths |= {key: tensor.shape[-1] for key, tensor in ref.tensors.items()}
        return _keys(widths)

    def probe_folders(self) -> list[Path]:  # noqa: D102
        saved = {file.parent for file in (self.run.path / "probes").glob(f"*/{CARDS}")}
        return sorted(saved | set(self.run.probe_folders()))

    def place_of(self, sample_id: str) -> int:  # noqa: D102
        return self.sample(sample_id)[0]

    def sample(self, sample_id: str) -> tuple[int, Sample]:
        """Return a sample and its place in the table.

        Raises:
            ViewError: 404 if there is none.
        """
        found = self.table.sample(sample_id)
        if found is None:
            raise ViewError(f"{self.found.name} has no sample {sample_id!r}", 404)
        return found

    def rollout(self, sample_id: str, turn: int) -> StoredRollout:  # noqa: D102
        _, sample = self.sample(sample_id)
        refs = {ref.turn: ref for ref in sample.rollouts}
        if turn not in refs:
            raise ViewError(f"{sample_id} has no rows of turn {turn}; there are {sorted(refs)}", 404)
        return self._sessions(self.run.session_uri(refs[turn])).rollout(refs[turn].rollout_id, 0)

    def _some_samples(self) -> Iterator[Sample]:
        names = self.table.query("SELECT sample_id FROM samples WHERE error IS NULL ORDER BY place LIMIT 3").fetchall()
        for (name,) in names:
            if (found := self.table.sample(name)) is not None:
                yield found[1]

    def _summary_if_true(self) -> dict[str, Any] | None:
        """Return summary.json, unless the record has grown since."""
        try:
            summary = self.run.summary()
        except RunError:
            return None
        if summary is None or summary.get("samples", 0) + summary.get("errors", 0) != self.table.count():
            return None
        return summary

    def _so_far(self) -> dict[str, Any]:
        """Return some of what summary.json will have, from the samples that there are."""
        counted = dict(
            self.table.query("SELECT verdict, count(*) FROM samples WHERE verdict IS NOT NULL GROUP BY 1").fetchall()
        )
        errors = counted.pop("failed", 0)
        (cut,) = self.table.query("SELECT count(*) FROM samples WHERE finish_reason = 'length'").fetchone() or (0,)
        return {
            "complete": False,
            "samples": sum(counted.values()),
            "errors": errors,
            "verdicts": {name: counted.get(name, 0) for name in ("correct", "wrong", "no_answer")},
            "unparsable": counted.get("no_answer", 0),
            "truncated": cut,
            "accuracy": self.accuracy(),
            "failures": self.failures(),
            "extractors": {},
        }

    def failures(self) -> list[dict[str, Any]]:
        """Return the failures by kind, the commonest first, as `summary.json` has them."""
        kinds = Failures()
        for name, message in self.table.query(
            "SELECT sample_id, error FROM samples WHERE error IS NOT NULL ORDER BY place"
        ).fetchall():
            kinds.add(name, message)
        return [failure.to_json() for failure in kinds.commonest_first()]


def unreadable(found: Found, error: Exception) -> Source:
    """Return the line of a source that cannot be opened."""
    return {**_unknown(found), "error": str(error)}


def _unknown(found: Found) -> Source:
    return {
        "id": found.id, "kind": found.kind, "name": found.name, "path": found.place.uri, "model": None, "problems": None,
        "created": None, "n_samples": None, "expected": None, "complete": False, "accuracy": None, "bytes": None, "live": False,
        "error": None,
    }  # fmt: skip


def _keys(widths: dict[str, int]) -> list[Key]:
    found: list[Key] = []
    for key in sorted(widths, key=execution_order):
        hook_point, layer = split_key(key)
        found.append({"key": key, "layer": layer, "hook_point": hook_point, "width": widths[key]})
    return found


def _table_file(found: Found) -> Path:
    return cache_folder() / "view" / f"{found.id}.v{VERSION}.duckdb"
