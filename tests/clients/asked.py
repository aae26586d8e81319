"""What every client is asked: the same model, tool, typed answer and rows to keep, in each client's own way."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from roentgen.store import Session

MODEL = "smollm2-135m"
QUESTION = "How is the weather in Oslo?"
SUM = "What is 2 + 3? Answer in JSON."
KEY = "layers.3.resid_post"


class Weather(BaseModel):
    """Look up the weather of a city."""

    city: Literal["Paris", "Oslo", "Rome"]


class Answer(BaseModel):
    """An answer to a sum."""

    number: int = Field(ge=0, le=99)
    sure: bool


def keep(session: str) -> dict[str, Any]:
    """What a request adds to its body: rows are kept, and words end with their first sentence, so that no reply is cut."""
    kept = {"session_id": session, "layers": [3], "hook_points": ["resid_post"], "positions": "last"}
    return {"activations": kept, "stop": ["."]}


def stored(store: Path, session: str) -> int:
    """How many rollouts a session has: none before its first."""
    return len(Session.open(str(store / session)).rollouts()) if (store / session / "session.json").exists() else 0
