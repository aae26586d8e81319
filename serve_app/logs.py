"""Logs for machines: one JSON object a line, with the id of the request that a line is about.

The id is a context variable: set where a request enters a process, it reaches every line logged on its behalf there.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

PACKAGES = ("serve_app", "roentgen")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that this context works for, None outside of one."""


class JsonFormatter(logging.Formatter):
    """Writes a record, and the fields given to it as `extra={"fields": {…}}`, as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (about := request_id.get()) is not None:
            line["request_id"] = about
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def write_json_logs() -> None:
    """Send what this process's server code logs to standard error as JSON; called once by each actor."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.handlers[:] = [handler]
