"""How many tokens a server has generated, asked while an evaluation waits for its first answers.

An answer may take minutes, and the evaluation hears nothing of it before it is whole. Servers count what they generate:
Roentgen's and vLLM's say it at `/metrics`, in the text that Prometheus reads. What others ask of the same server is in the
number too, so it is shown as a sign of life and recorded nowhere.
"""

import re

from httpx2 import Client, HTTPError

from eval_jobs.endpoint import Endpoint
from roentgen.http_client import connect

COUNTERS = re.compile(
    r"^(?:roentgen_batch_size_sum|vllm:generation_tokens_total)(?:\{[^}]*\})? ([0-9.eE+]+)", re.MULTILINE
)
"""Lines that count tokens, one per replica: the first is the sum of all steps' batches, a token for each job of a batch."""

PATIENCE_S = 2.0


class ServerTokenCounter:
    """Counts the tokens that a server has generated since this was made; close it after use."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Know the server."""
        root = endpoint.urls[0].removesuffix("/v1")
        self._client: Client | None = connect(root, endpoint.api_key, PATIENCE_S)
        self._before: float | None = None

    def tokens(self) -> int | None:
        """Return how many there are now; None if the server does not say, which is then not asked again."""
        if self._client is None:
            return None
        try:
            answer = self._client.get("/metrics")
        except HTTPError:
            return None  # busy, or gone; whoever waits for an answer finds out
        counts = [float(number) for number in COUNTERS.findall(answer.text)] if answer.is_success else []
        if not counts:
            if not answer.is_success:
                self.close()
            return None
        if self._before is None:
            self._before = sum(counts)
        return max(0, round(sum(counts) - self._before))

    def close(self) -> None:
        """Ask no more."""
        if self._client is not None:
            self._client.close()
            self._client = None
