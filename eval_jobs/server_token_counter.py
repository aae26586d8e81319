"""Counts the tokens that a server has generated, for progress before the first answers arrive.

An answer may take minutes, and the evaluation receives nothing before it is complete. Servers count the tokens they
generate: Roentgen and vLLM report it at `/metrics`, in Prometheus's text format. The count includes requests of other
clients, so it is displayed as a sign of activity and never recorded.
"""

import re

from httpx2 import Client, HTTPError

from eval_jobs.endpoint import Endpoint
from roentgen.http_client import connect

COUNTERS = re.compile(
    r"^(?:roentgen_batch_size_sum|vllm:generation_tokens_total)(?:\{[^}]*\})? ([0-9.eE+]+)", re.MULTILINE
)
"""Metrics that count tokens, one per replica. The first is the sum of the batch sizes of all steps, which is one token per
job and step."""

PATIENCE_S = 2.0


class ServerTokenCounter:
    """A counter of the tokens generated since its creation; close it after use."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Create a counter."""
        root = endpoint.urls[0].removesuffix("/v1")
        self._client: Client | None = connect(root, endpoint.api_key, PATIENCE_S)
        self._before: float | None = None

    def tokens(self) -> int | None:
        """Return the count; None if the server does not report one, in which case it is not queried again."""
        if self._client is None:
            return None
        try:
            answer = self._client.get("/metrics")
        except HTTPError:
            return None  # busy or lost; the pending requests will report it
        counts = [float(number) for number in COUNTERS.findall(answer.text)] if answer.is_success else []
        if not counts:
            if not answer.is_success:
                self.close()
            return None
        if self._before is None:
            self._before = sum(counts)
        return max(0, round(sum(counts) - self._before))

    def close(self) -> None:
        """Stop querying the server."""
        if self._client is not None:
            self._client.close()
            self._client = None
