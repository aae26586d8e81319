"""Fetches vLLM's source distribution, and unpacks the tests that are run of it.

They are never part of this repository: a version is named here, with its hash, and pip's own settings say where it is found.
"""

import hashlib
import io
import tarfile
from pathlib import Path

from pip._internal.commands.download import DownloadCommand

VERSION = "0.33.0"
SHA256 = "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112"
PARTS = ("tests/__init__.py", "tests/entrypoints/", "tests/tool_use/")
SETTINGS = "[pytest]\nasyncio_mode = auto\nfilterwarnings = ignore\n"


def fetch(folder: Path) -> Path:
    """Return the folder that holds vLLM's `tests`, fetched if it is not there."""
    unpacked = folder / f"vllm-{VERSION}"
    if not all((unpacked / part).exists() for part in (*PARTS, "pytest.ini")):
        with tarfile.open(fileobj=io.BytesIO(_download())) as archive:
            wanted = [
                member
                for member in archive.getmembers()
                if member.isfile() and member.name.partition("/")[2].startswith(PARTS)
            ]
            archive.extractall(folder, wanted, filter="data")
        (unpacked / "pytest.ini").write_text(SETTINGS)
    return unpacked


def _download() -> bytes:
    """Return the source distribution.

    `pip download` would build it to learn what it needs; only pip's finder is used.

    Raises:
        LookupError: if it is nowhere to be found.
        ValueError: if it is another file than the one named here.
    """
    command = DownloadCommand("download", "")
    options, _ = command.parse_args([])
    with command.main_context():
        session = command.get_default_session(options)
        found = command._build_package_finder(options, session).find_all_candidates("vllm")
        name = f"vllm-{VERSION}.tar.gz"
        link = next((one.link for one in found if one.link.filename == name), None)
        if link is None:
            raise LookupError(f"pip finds no {name}")
        response = session.get(link.url_without_fragment)
        response.raise_for_status()
        content: bytes = response.content
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{name} is not the file that is named here")
    return content
