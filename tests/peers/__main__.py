"""Runs vLLM's entrypoint tests against a server of this project, and tells how many pass and why others do not run.

`python -m tests.peers [--share N] [FILE_OR_TEST ...]`: one real server, SmolLM2-135M on a CPU, is asked by several processes
of pytest at once, because it answers several requests in hardly more time than one. `--share N` runs every N-th test, chosen
by the commit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from roentgen.defaults import EMBEDDED_MODEL
from serve_app.models.model_source import locate
from tests.conftest import RayHome, Server, clean_up, start_server
from tests.peers.source import VERSION, fetch
from tests.rotation import commit_number

FOLDER = Path(".peers")
SUITES = (
    "tests/entrypoints/openai",
    "tests/entrypoints/serve/tokenize",
    "tests/entrypoints/serve/instrumentator",
    "tests/tool_use",
)
PROCESSES = 4
SECONDS_A_TEST = 120


def main() -> int:
    """Run the suite; the exit code is 1 if a test fails that is not listed."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("--share", type=int, default=1, help="run every N-th test")
    parser.add_argument("tests", nargs="*", help="files or tests, as vLLM's repository has them")
    asked = parser.parse_args()
    unpacked = fetch(FOLDER.absolute())
    home = RayHome(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    with tempfile.TemporaryDirectory() as place:
        store = Path(place) / "store"
        (store / "probes").mkdir(parents=True)
        server = start_server(store, home)
        try:
            outcomes = _run(unpacked, server, Path(place), asked.tests or SUITES, asked.share)
        finally:
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
            home.wait_until_gone()
            clean_up(home)
    return _tell(outcomes)


def _run(unpacked: Path, server: Server, place: Path, tests: Sequence[str], share: int) -> list[dict[str, str]]:
    """Run the tests, a part in each process; returns what became of each."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(unpacked), str(Path(__file__).parent)]),
        "PEERS_URL": server.root,
        "PEERS_MODEL": EMBEDDED_MODEL,
        "PEERS_TOKENIZER": locate(EMBEDDED_MODEL).path,
        "PEERS_SHARE": str(share),
        "PEERS_PARTS": str(PROCESSES),
        "PEERS_WHOLE": "yes" if tests is SUITES else "",
        "PEERS_NUMBER": str(commit_number(Path.cwd())),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "vllm_suite",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
    ]
    command += ["--quiet", "--tb=short", f"--timeout={SECONDS_A_TEST}", "--rootdir", str(unpacked), *tests]
    running = []
    for part in range(PROCESSES):
        told = {"PEERS_PART": str(part), "PEERS_OUTCOMES": str(place / f"{part}.jsonl")}
        log = open(place / f"{part}.log", "w")  # noqa: SIM115 - the process writes to it
        process = subprocess.Popen(command, cwd=unpacked, env=environment | told, stdout=log, stderr=subprocess.STDOUT)
        running.append(process)
    for process in running:
        process.wait()
    outcomes = []
    for part in range(PROCESSES):
        said = (place / f"{part}.log").read_text()
        print(said[-30_000:] if running[part].returncode not in (0, 5) else "")
        outcomes += [json.loads(line) for line in (place / f"{part}.jsonl").read_text().splitlines()]
    return outcomes


def _tell(outcomes: list[dict[str, str]]) -> int:
    by_outcome = Counter(one["outcome"] for one in outcomes)
    reasons = Counter(one["reason"] for one in outcomes if one["outcome"] == "skipped")
    print(f"vLLM {VERSION}'s entrypoint tests: {by_outcome['passed']} passed, {by_outcome['failed']} failed")
    for reason, count in reasons.most_common():
        print(f"{count:5} not run: {reason}")
    for one in outcomes:
        if one["outcome"] == "failed":
            print(f"failed: {one['test']}: {one['reason']}")
    return int(by_outcome["failed"] > 0 or by_outcome["passed"] == 0)


sys.exit(main())
