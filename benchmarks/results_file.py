"""Maintains RESULTS.md: each benchmark owns the section under its heading and replaces it completely."""

import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from roentgen.atomic_files import write_text

RESULTS = Path(__file__).parent / "RESULTS.md"
PACKAGES = ("torch", "transformers", "nnsight", "ray")


def replace_section(document: str, title: str, body: str) -> str:
    """Return a Markdown document in which the section `## title` has this body; appended if it is not there."""
    section = f"## {title}\n\n{body.strip()}\n"
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{document.rstrip()}\n\n{section}" if document.strip() else section
    rest = document[found.end() :]
    return document[: found.start()] + section + (f"\n{rest}" if rest else "")


def record(title: str, body: str, path: Path = RESULTS) -> None:
    """Write a benchmark's section, with the machine, the date, the versions and the command that made it."""
    text = path.read_text() if path.exists() else "# Measured\n"
    write_text(path, replace_section(text, title, f"{body.strip()}\n\n{conditions()}"))


def conditions() -> str:
    """Return the conditions of a measurement: machine, time, versions."""
    versions = ", ".join(f"{name} {number}" for name, number in installed().items())
    script = Path(sys.argv[0])
    command = shlex.join(["python", "-m", f"benchmarks.{script.stem}", *sys.argv[1:]])
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"{today}; {machine()}; Python {platform.python_version()}, {versions}.\n\n    {command}"


def installed() -> dict[str, str]:
    """Return the versions of the packages that matter to a measurement; not every benchmark needs all of them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Describe this machine in a line."""
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {torch.get_num_threads()} threads, {memory}"
    return f"{_processor()}, {torch.get_num_threads()} threads, {memory}, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    """Return the processor's name, if Linux reports it."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table; the first column is text, the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
