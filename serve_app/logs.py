"""JSON logs: one object per line, with the id of the request that the line belongs to.

The id is a context variable. It is set where a request enters a process, so every line logged for the request there has it.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

PACKAGES = ("serve_app", "roentgen")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that this context serves; None outside of requests."""


class JsonFormatter(logging.Formatter):
    """Formats a log record, and the fields passed as `extra={"fields": {…}}`, as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line of JSON."""
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
    """Write this process's server logs to standard error as JSON. Each actor calls it once."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.handlers[:] = [handler]
