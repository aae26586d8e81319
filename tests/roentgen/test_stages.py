"""No silent wait: while a stage lasts, something new is shown, on a terminal and in a log."""

import io
import os
import pty
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise

from rich.console import Console

from roentgen.stages import Stages

SLOW = """
import time
from rich.console import Console
from roentgen.stages import Stages
console = Console(stderr=True)
with Stages(console) as stage:
    stage("starting Ray")
    time.sleep(4)
    stage("loading weights")
    time.sleep(4)
    stage.rest()
    print("RESTING", flush=True)
    time.sleep(1.5)
    print("DONE", flush=True)
"""


def watched(command: list[str]) -> list[tuple[float, bytes]]:
    """Run a command on a terminal; return what it showed and when."""
    parent, child = pty.openpty()
    process = subprocess.Popen(command, stdout=child, stderr=child, stdin=child, env={**os.environ, "TERM": "xterm"})
    os.close(child)
    shown: list[tuple[float, bytes]] = []
    while True:
        try:
            piece = os.read(parent, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        shown.append((time.monotonic(), piece))
    os.close(parent)
    assert process.wait() == 0, b"".join(piece for _, piece in shown)
    return shown


def longest_silence(shown: list[tuple[float, bytes]]) -> float:
    """The longest time between two things that differ on the screen."""
    times = [at for at, piece in shown if piece.strip()]
    return max(later - earlier for earlier, later in pairwise(times))


def test_a_terminal_is_never_silent_for_three_seconds_while_a_stage_lasts() -> None:
    shown = watched([sys.executable, "-c", SLOW])
    text = b"".join(piece for _, piece in shown).decode()
    assert text.index("starting Ray") < text.index("loading weights") < text.index("RESTING") < text.index("DONE")
    assert "… 3 s" in text  # the clock moves
    assert longest_silence(shown) < 3
    assert text.rindex("…") < text.index("RESTING")  # and stands still when the command rests


def test_a_log_gets_a_line_a_stage_and_one_now_and_then() -> None:
    log = io.StringIO()
    with Stages(Console(file=log, width=80), every_s=0.1) as stage:
        stage("starting Ray")
        time.sleep(0.35)
        stage("[bold]loading[/bold] weights")
        stage.rest()
        said = log.getvalue()
        time.sleep(0.25)
        assert log.getvalue() == said
    lines = [line.partition(" s ")[2] for line in said.splitlines()]
    assert lines[0] == "starting Ray"
    assert 2 <= lines.count("still starting Ray") <= 4
    assert lines[-1] == "[bold]loading[/bold] weights"


def test_an_error_ends_the_clock() -> None:
    log = io.StringIO()
    with suppress(ValueError), Stages(Console(file=log), every_s=0.05) as stage:
        stage("loading")
        raise ValueError("no")
    said = log.getvalue()
    time.sleep(0.2)
    assert log.getvalue() == said
