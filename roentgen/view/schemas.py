"""The replies, as JSON. `viewer/src/api.ts` has the same names; a test holds the two together."""

from typing import Any, Literal, NotRequired, TypedDict

Kind = Literal["run", "session"]
ColumnType = Literal["text", "number", "bool", "category"]


class Interval(TypedDict):
    """An estimate with its 95% interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Source(TypedDict):
    """A run, or a session of a store."""

    id: str
    kind: Kind
    name: str
    path: str
    model: str | None
    problems: str | None
    created: str | None
    n_samples: int | None
    expected: int | None
    complete: bool
    accuracy: Interval | None
    bytes: int | None
    live: bool
    error: str | None


class SourceList(TypedDict):
    """What the command line named, and what lies in those folders."""

    version: str
    sources: list[Source]


class Key(TypedDict):
    """A stored key."""

    key: str
    layer: int | None
    hook_point: str
    width: int


class Column(TypedDict):
    """What samples can be filtered and sorted by."""

    name: str
    type: ColumnType
    values: NotRequired[list[str]]


class Probe(TypedDict):
    """A saved probe, named `LABEL/KEY@POSITIONS`."""

    name: str
    key: str
    label: str
    classes: list[str]


class Overview(TypedDict):
    """All that is known of a source but its samples."""

    source: Source
    config: dict[str, Any] | None
    summary: dict[str, Any] | None
    keys: list[Key]
    columns: list[Column]
    probes: list[Probe]
    reports: list[str]
    directions: list[str]
    lens: str | None


class Page(TypedDict):
    """A window of the samples that match."""

    total: int
    matched: int
    offset: int
    rows: list[dict[str, Any]]


class Series(TypedDict):
    """Counts of one group."""

    name: str
    counts: list[int]


class Histogram(TypedDict):
    """Counts between edges, or per value of a column that has no order (`values`)."""

    edges: list[float]
    series: list[Series]
    values: NotRequired[list[str]]


class Extracted(TypedDict):
    """What an extractor read, and where in the response that stands."""

    extractor: str
    read: str | None
    start: int | None
    stop: int | None
    verdict: str | None


class StoredTurn(TypedDict):
    """The rollout of one turn."""

    turn: int
    rollout_id: str
    n_prompt: int | None
    n_completion: int | None
    keys: list[str]
    stored: bool
    values: list[str]


class SampleInfo(TypedDict):
    """What the record says of a sample."""

    sample_id: str
    problem: str | None
    epoch: int | None
    variant: str | None
    question: str | None
    solution: str | None
    gold: str | None
    answers: dict[str, str | None]
    correct_by: dict[str, bool]
    verdict: str | None
    values: dict[str, Any]
    labels: dict[str, Any]
    error: str | None
    finish_reason: str | None
    response: str
    messages: list[dict[str, Any]]
    turns: list[dict[str, Any]]
    extracted: list[Extracted]


class OneSample(TypedDict):
    """One sample, and its neighbors among those that match."""

    sample: SampleInfo
    rollouts: list[StoredTurn]
    python: str
    previous: str | None
    next: str | None


class TokenSegment(TypedDict):
    """Tokens that one role spoke."""

    role: str
    start: int
    stop: int


class Tokens(TypedDict):
    """Tokens `[start, start + len(ids))` of a turn; positions are in the whole sequence."""

    total: int
    start: int
    n_prompt: int
    ids: list[int]
    texts: list[str]
    special: list[int]
    segments: list[TokenSegment]
    steps: list[int]


class Values(TypedDict):
    """A number per token; null where there is none. `low` and `high` span the colors."""

    of: str
    start: int
    values: list[float | None]
    low: float | None
    high: float | None
    unit: str


class Grid(TypedDict):
    """A number per layer and hook point at one token; with the logit lens also what is read there."""

    layers: list[int | None]
    hook_points: list[str]
    values: list[list[float | None]]
    texts: NotRequired[list[list[str | None]]]
    missing: str | None


class Verdict(TypedDict):
    """What one of two runs says of a problem."""

    sample_id: str
    verdict: str | None
    answer: str | None


class Changed(TypedDict):
    """A problem on which two runs differ."""

    problem: str
    question: str
    a: Verdict
    b: Verdict


class Mcnemar(TypedDict):
    """McNemar's exact test."""

    p: float | None
    only_a: int
    only_b: int


class Unmatched(TypedDict):
    """Problems that the other run does not have."""

    a: int
    b: int


class Comparison(TypedDict):
    """Two runs on the same problems; the difference is b minus a."""

    a: Source
    b: Source
    difference: Interval
    mcnemar: Mcnemar
    configuration: list[tuple[str, Any, Any]]
    changed: list[Changed]
    unmatched: Unmatched


class Estimate(TypedDict):
    """An estimate with its 95% interval."""

    value: float | None
    low: float | None
    high: float | None


class Candidate(TypedDict):
    """A probe that was tried; `auroc` is the report's metric, whichever it is."""

    name: str
    key: str
    layer: int | None
    hook_point: str
    position: str
    auroc: Estimate
    chosen: bool


class Best(Estimate):
    """The best candidate of each fold."""

    keys: list[str]
    metrics: dict[str, Estimate]


class ScoresByClass(TypedDict):
    """Scores out of fold."""

    unit: str | None
    classes: list[dict[str, Any]]


class ProbeReport(TypedDict):
    """What a training of probes found."""

    name: str
    label: str
    n: int
    metric: str
    facts: dict[str, Any]
    notes: list[str]
    by_candidate: list[Candidate]
    best: Best
    baselines: dict[str, Estimate]
    reliability: list[dict[str, float]]
    risk_coverage: list[dict[str, float]]
    scores: ScoresByClass
    traces: list[dict[str, Any]]
    errors: list[dict[str, Any]]


class Progress(TypedDict):
    """How far a run is."""

    n_samples: int
    expected: int | None
    accuracy: Interval | None
    tokens_per_s: float | None
    in_flight: int | None
    failures: dict[str, int]
    monitor: dict[str, Any] | None
    complete: bool
