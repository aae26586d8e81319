"""What the tests of other people's clients share: the served model, and the documentation's own commands to run.

They run in an environment of their own, `make test-clients`, because these clients would weigh on every user of the server.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from roentgen.defaults import EMBEDDED_MODEL
from serve_app.models.model_source import locate
from tests.conftest import ROENTGEN, Server

# litellm, and dspy on it, would look on the Internet for newer lists of models.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

DOCS = Path(__file__).parents[2] / "docs" / "clients.md"
DOCUMENTED_ROOT = "http://127.0.0.1:8000"


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120) as opened:
        yield opened


@dataclass(frozen=True)
class Documentation:
    """The blocks of docs/clients.md, by the name after the fence's language, made to work on this server.

    Attributes:
        folder: where the documented files are, and where commands run.
        blocks: the text of each block.
    """

    folder: Path
    blocks: dict[str, str]

    def run(self, name: str) -> str:
        """Run a documented command; return what it printed."""
        clients = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PATH": f"{clients}:{Path(ROENTGEN).parent}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            ["bash", "-euc", self.blocks[name]],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout


@pytest.fixture(scope="module")
def docs(server: Server, gsm8k_test: Path, tmp_path_factory: pytest.TempPathFactory) -> Documentation:
    """The documentation, in a folder with its files, and GSM8K as `gsm8k/`."""
    locate(EMBEDDED_MODEL)  # the documented commands read its folder in the cache
    folder = tmp_path_factory.mktemp("documented")
    (folder / "gsm8k").symlink_to(gsm8k_test.parent)
    text = DOCS.read_text().replace(DOCUMENTED_ROOT, server.root)
    blocks = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for name, block in blocks.items():
        if "." in name:
            (folder / name).write_text(block)
    return Documentation(folder, blocks)
