"""`roentgen eval --launch`: brings up a cluster, evaluates there, fetches the results, and takes down what it created.

The evaluation runs as a SkyPilot job on the cluster, so that autostop notices it. Files that its options name are copied there
first. The run directory is always fetched. An existing run directory is copied to the cluster too, so that the same command
continues it on any cluster. Activations are fetched if requested, or if they would be lost with the cluster; in a bucket they
stay readable. In every case, including Ctrl-C, a cluster that was created here is taken down, unless it must keep running; an
existing cluster is left as it is.
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
    """What to do after the evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_running: bool = False
    """Keep a newly created cluster running."""
    transfer_activations: bool | None = None
    """Whether to fetch the activations; None fetches those that would be lost with the cluster."""
    output: Path | None = None
    """The local run directory."""


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
        settings: the cluster's settings.
        options: arguments for `python -m eval_jobs`, without --output and options that name files.
        afterwards: what to do after the evaluation.
        sky: SkyPilot.
        stage: called with each stage.
        files: local files, or objects in Python files (`file.py:name`), by the option that names them. Modules of the same
            folder that a Python file has imported are copied with it.

    Returns:
        The local run directory.

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
            stage(f"copying {output} to the cluster, to continue it")
            head.push(output, there.removeprefix("~/"), leave_out="activations")
        copies, words = sent_files(files)
        for file, folder in copies:
            head.push_file(file, folder)
        stage(f"evaluating; the run directory on the cluster is {there}")
        nodes = next((one.nodes for one in sky.clusters() if one.name == launched.name), 1)
        asked = " ".join([shlex.join(options), f"--output {there}", *words])
        command = ["exec", launched.name, str(TASK), "--num-nodes", str(nodes), "--env", f"EVAL={asked}"]
        code, last = sky.stream(command, stage)
        # Also fetch a failed evaluation, for its finished samples.
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
    """Return the files to copy with their target folders on the head, and the options that name them there.

    Each local folder has its own folder there, so that equal names do not collide and a Python file finds its neighbors.
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
    """Refuse a launch whose activations would be lost with the cluster.

    Raises:
        LaunchError: if they would be lost.
    """
    stays = afterwards.keep_running or not launched.created or "://" in settings.store
    if afterwards.transfer_activations is False and not stays:
        raise LaunchError(
            "--remote-storage-only: the activations would be lost with the cluster; add --keep-running, or a --store that "
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
    """Fetch a run's session into `activations/` in the run directory.

    Raises:
        LaunchError: if it cannot be copied.
    """
    try:
        uris = {ref.uri for sample in Run(output).read_samples() for ref in sample.rollouts}
    except RunError as error:
        raise LaunchError(f"the fetched run cannot be read: {error}") from error
    for uri in sorted(uris):
        if "://" in uri:
            stage(f"{uri} is in an object store and stays readable; not fetched")
            continue
        target = output / "activations" / Path(uri).name
        stage(f"fetching {uri} to {target}")
        head.fetch(uri, target)


@contextmanager
def _taken_down(
    sky: SkyPilot, keep_running: bool, stage: Callable[[str], None]
) -> Iterator[Callable[[Launched], None]]:
    """Take down the clusters that were created in the context, however it ends; SIGTERM is handled like Ctrl-C."""
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
            stage(f"{launched.name} existed before and keeps running")
        elif keep_running:
            stage(f"{launched.name} keeps running and COSTS MONEY until `roentgen cluster down {launched.name}`")
        elif sky.find(launched.name) is None:
            stage(f"{launched.name} does not exist: nothing to take down")
        else:
            stage(f"taking {launched.name} down")
            gone = sky.down(launched.name, stage)
            stage(
                f"{launched.name} is down: its provider confirms that {', '.join(gone) or 'every instance'} is terminated"
            )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C, also in commands started inside: an interrupted teardown would leave a machine that costs money."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
