"""Takes a picture of a view for the documentation: `python -m tests.browser.picture results/demo docs/images/view.png`."""

import argparse
import asyncio
import json
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from roentgen.view.serving import viewing
from tests.browser.chromium import running

SIZE = (1280, 800)


async def take(page: str, sample: str, token: int, file: Path) -> None:
    """Write a run's tokens, with what the logit lens reads at one of them, as a PNG.

    Args:
        page: the address that `roentgen view` prints.
        sample: the sample's id.
        token: the open token's position.
        file: of the picture.
    """
    place = urlsplit(page)
    with urllib.request.urlopen(f"{place.scheme}://{place.netloc}/api/sources?{place.query}") as reply:
        (run,) = [source["id"] for source in json.load(reply)["sources"] if source["kind"] == "run"]
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program is not None, "there is no Chromium"
    async with running(program) as browser:
        width, height = SIZE
        await browser.show_as(width, "light")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1.5, "mobile": False}
        await browser.do("Emulation.setDeviceMetricsOverride", **metrics)
        await browser.open(f"{page}#/run/{run}/sample/{sample}?token={token}&map=lens")
        await browser.wait_for("document.querySelector('.inspector .x-cell') && document.querySelector('.t.chosen')")
        await asyncio.sleep(0.5)  # the strip is drawn after the values have come
        file.write_bytes(await browser.picture())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run with activations and probes")
    parser.add_argument("file", type=Path)
    parser.add_argument("--sample", default="arithmetic_0011")
    parser.add_argument("--token", type=int, default=176)
    args = parser.parse_args()
    with viewing([args.run]) as page:
        asyncio.run(take(page, args.sample, args.token, args.file))


if __name__ == "__main__":
    main()
