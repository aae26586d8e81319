"""`roentgen eval --launch`: bring a cluster up, evaluate there, fetch the results, and take down what was created.

The evaluation runs as a job of SkyPilot's, on the cluster, so that autostop sees it. Files that its options name go there
first. The run directory is always fetched, and a run that is here already goes there too, so that the same command continues
it on any cluster. Activations are fetched if asked, or if they would end with the cluster; in a bucket they stay readable.
Whatever happens, also Ctrl-C, a cluster that was created here is taken down, unless it is to keep running; one that was there
is left alone.
"""

import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from roentgen.cloud.remote import Head
from roentgen.cloud.skypilot import ROOT, SkyPilot
from roentgen.cloud.task import ClusterSettings
from roentgen.cloud.up import Launched, up
from roentgen.extensions import file_of, imported_beside
from roentgen.runs import Run, RunError
from roentgen.serving.local_server import LaunchError

TASK = ROOT / "eval.yaml"
REMOTE_RUNS = "~/runs"
REMOTE_FILES = "~/runs/.files"


class Afterwards(BaseModel):
    """What is done when the evaluation is over."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_running: bool = False
    """Leave a cluster that was created for this running."""
    transfer_activations: bool | None = None
    """Fetch the activations too; if absent, those that would end with a cluster that is taken down."""
    output: Path | None = None
    """The run directory here."""


def launch_and_evaluate(
    settings: ClusterSettings,
    options: Sequence[str],
    afterwards: Afterwards,
    sky: SkyPilot,
    stage: Callable[[str], None],
    files: Mapping[str, Path | str] = {},
) -> Path:
    """Evaluate on a cluster.

    Args:
        settings: of the cluster.
        options: of the evaluation, as `python -m eval_jobs` takes them, without --output and those that name files.
        afterwards: what is done when it is over.
        sky: SkyPilot.
        stage: told what is being done.
        files: per option that names a file, or something in a Python file (`file.py:name`), what it names here. With a Python
            file go the modules of its folder that it has imported here.

    Returns:
        The run directory here.

    Raises:
        LaunchError: if the cluster, the evaluation or taking it down fails, or its activations would be lost.
    """
    name = f"eval_{datetime.now().strftime('%Y%m%d_%H%M%S')}"
    output = (afterwards.output or Path("results") / name).expanduser().absolute()
    with _taken_down(sky, afterwards.keep_running, stage) as claim:
        launched = up(settings, sky, stage, claim=claim, accept=partial(_check_kept, settings, afterwards))
        head = Head(launched.name)
        there = f"{REMOTE_RUNS}/{output.name}"
        if (output / "config.json").exists():
            stage(f"taking {output} there, to continue it")
            head.push(output, there.removeprefix("~/"), leave_out="activations")
        copies, words = sent_files(files)
        for file, folder in copies:
            head.push_file(file, folder)
        stage(f"evaluating; the run directory there is {there}")
        nodes = next((one.nodes for one in sky.clusters() if one.name == launched.name), 1)
        asked = " ".join([shlex.join(options), f"--output {there}", *words])
        command = ["exec", launched.name, str(TASK), "--num-nodes", str(nodes), "--env", f"EVAL={asked}"]
        code, last = sky.stream(command, stage)
        # Also of an evaluation that failed: what is finished is worth having.
        stage(f"fetching {there}")
        fetched = _fetch(head, there.removeprefix("~/"), output, stage)
        ends = launched.created and not afterwards.keep_running
        wanted = ends if afterwards.transfer_activations is None else afterwards.transfer_activations
        if fetched and wanted:
            _fetch_activations(head, output, stage)
        if code:
            raise LaunchError(f"the evaluation on {launched.name} failed (exit code {code}):\n" + "\n".join(last))
    return output


def sent_files(files: Mapping[str, Path | str]) -> tuple[list[tuple[Path, str]], list[str]]:
    """Return which files go into which folder of the head's home, and the options that name them there.

    Each folder here has one of its own there: files of one name do not meet, and a Python file finds its neighbors.
    """
    places: dict[Path, str] = {}
    copies, words = [], []
    for option, named in files.items():
        file, attribute = file_of(str(named)) or (Path(named), "")
        place = places.setdefault(file.parent, f"{REMOTE_FILES}/{len(places) + 1}" if places else REMOTE_FILES)
        for one in [file, *(imported_beside(file) if attribute else [])]:
            beside = one.relative_to(file.parent).parent
            copies.append((one, str(Path(place.removeprefix("~/")) / beside)))
        words.append(f"{option} {place}/{shlex.quote(f'{file.name}:{attribute}' if attribute else file.name)}")
    return list(dict.fromkeys(copies)), words


def _check_kept(settings: ClusterSettings, afterwards: Afterwards, launched: Launched) -> None:
    """Refuse to take activations down with the cluster that they are on.

    Raises:
        LaunchError: naming the ways out.
    """
    stays = afterwards.keep_running or not launched.created or "://" in settings.store
    if afterwards.transfer_activations is False and not stays:
        raise LaunchError(
            "--remote-storage-only: the activations would end with the cluster: add --keep-running, or a --store that "
            "outlives it (s3://BUCKET/FOLDER)"
        )


def _fetch(head: Head, there: str, here: Path, stage: Callable[[str], None]) -> bool:
    try:
        head.fetch(there, here)
    except LaunchError as error:
        stage(str(error))
        return False
    return True


def _fetch_activations(head: Head, output: Path, stage: Callable[[str], None]) -> None:
    """Fetch a run's session into `activations/` beside the run.

    Raises:
        LaunchError: if it cannot be copied.
    """
    try:
        uris = {ref.uri for sample in Run(output).read_samples() for ref in sample.rollouts}
    except RunError as error:
        raise LaunchError(f"the run that came back cannot be read: {error}") from error
    for uri in sorted(uris):
        if "://" in uri:
            stage(f"{uri} is an object store, which is read from anywhere: nothing to fetch")
            continue
        target = output / "activations" / Path(uri).name
        stage(f"fetching {uri} to {target}")
        head.fetch(uri, target)


@contextmanager
def _taken_down(
    sky: SkyPilot, keep_running: bool, stage: Callable[[str], None]
) -> Iterator[Callable[[Launched], None]]:
    """Take down what was claimed and created inside, however that ends: SIGTERM counts as Ctrl-C, and a second one waits."""
    claimed: list[Launched] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield claimed.append
    finally:
        signal.signal(signal.SIGTERM, before)
        with _uninterrupted():
            _take_down(claimed, sky, keep_running, stage)


def _take_down(claimed: list[Launched], sky: SkyPilot, keep_running: bool, stage: Callable[[str], None]) -> None:
    for launched in claimed:
        if not launched.created:
            stage(f"{launched.name} was there before and is left running")
        elif keep_running:
            stage(f"{launched.name} is kept running and COSTS MONEY until `roentgen cluster down {launched.name}`")
        elif sky.find(launched.name) is None:
            stage(f"{launched.name} does not exist: nothing to take down")
        else:
            stage(f"taking {launched.name} down")
            gone = sky.down(launched.name, stage)
            stage(f"{launched.name} is down: its provider says that {', '.join(gone) or 'every instance'} is gone")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C, as commands started inside then do too: half a teardown is a machine that goes on costing money."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
