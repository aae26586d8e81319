"""Prints a benchmark's stages to stderr with the elapsed seconds."""

import sys
import time
from collections.abc import Callable


def stage_printer() -> Callable[[str], None]:
    """Start the clock and return the function that prints a stage."""
    start = time.monotonic()
    return lambda text: print(f"{time.monotonic() - start:7.1f} s  {text}", file=sys.stderr, flush=True)
