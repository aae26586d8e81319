"""Runs pip and shows that it is at work: `python tools/pip_install.py LABEL ARGUMENTS…`.

pip either says hundreds of lines or, told to be quiet, nothing for minutes. On a terminal, this shows its last line with a
clock; in a log, one line every ten seconds. If pip fails, what it said last is shown. It needs Python only, because nothing is
installed yet when it runs; the pip is that of the Python that runs it.
"""

import subprocess
import sys
import time
from collections import deque
from threading import Thread
from typing import IO

EVERY_S = 10.0
"""Seconds between two lines, where there is no terminal."""

KEPT = 40
"""Lines that are shown if pip fails."""

WIDTH = 100


def main(label: str, arguments: list[str]) -> int:
    """Run `pip install` and return its exit status."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--progress-bar",
        "off",
        *arguments,
    ]
    started = last = time.monotonic()
    terminal = sys.stderr.isatty()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    said: deque[str] = deque(maxlen=KEPT)
    reading = Thread(target=_read, args=(process.stdout, said), daemon=True)
    reading.start()
    _say(f"installing {label}")
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if now - last >= (0.5 if terminal else EVERY_S):
            last = now
            text = f"{now - started:6.1f} s {said[-1] if said else 'starting pip'}"[:WIDTH]
            _say(text, "\r\x1b[2K" if terminal else "", "" if terminal else "\n")
    reading.join()
    if terminal:
        _say("", "\r\x1b[2K", "")
    if process.returncode:
        _say("\n".join(said))
    _say(f"{time.monotonic() - started:6.1f} s {label}: {'failed' if process.returncode else 'installed'}")
    return process.returncode


def _read(output: IO[str] | None, said: "deque[str]") -> None:
    for line in output or ():
        if line.strip():
            said.append(line.strip())


def _say(text: str, before: str = "", after: str = "\n") -> None:
    sys.stderr.write(f"{before}{text}{after}")
    sys.stderr.flush()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
