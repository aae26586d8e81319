"""Computes how much of a machine's free memory an engine may use, for its KV cache and for captured rows."""

from pathlib import Path

import psutil

from serve_app.capture.rows import CapturePlan

DEVICE_SHARE, HOST_SHARE = 0.8, 0.25
"""Shares of the free memory: for keys and values on a GPU, and for captured rows on the host."""

PREFIX_SHARE = 0.1
"""Share of the host's free memory for rows of prompts that are found in vLLM's prefix cache."""

CPU_SHARE = 0.4
"""Share of the free memory for keys and values if the model runs on the CPU, which also needs working memory."""


def row_bytes(plan: CapturePlan, n_prompt: int, n_rows: int, bytes_per_row: int) -> int:
    """Return the bytes that a job's rows may take.

    Args:
        plan: which rows it keeps.
        n_prompt: tokens of its prompt.
        n_rows: largest number of its rows.
        bytes_per_row: bytes of one hook point's row.
    """
    return plan.count(n_prompt, n_rows) * len(plan.taps) * bytes_per_row


def free_host_memory() -> int:
    """Return the free host memory in bytes: the machine's, or this container's if that is less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used, but are freed on demand.
        used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
        free = min(free, int(text) - used)
    return max(free, 0)
