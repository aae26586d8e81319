"""Says on stderr what a benchmark is doing, with the seconds since it began."""

import sys
import time
from collections.abc import Callable


def stage_printer() -> Callable[[str], None]:
    """Begin to count; return the function that prints."""
    start = time.monotonic()
    return lambda text: print(f"{time.monotonic() - start:7.1f} s  {text}", file=sys.stderr, flush=True)
