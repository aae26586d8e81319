"""Pages in a real browser: headless Chromium, driven over its own debugging protocol."""

import os
import shutil
from collections.abc import AsyncIterator

import pytest

from tests.browser.chromium import Browser, running

collect_ignore_glob = [] if os.environ.get("ROENTGEN_TEST_BROWSER") else ["test_*.py"]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A browser with an empty page of 1200 × 900."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium; `make test-browser` installs Debian's when it runs as root")
    async with running(program) as browser:
        yield browser
