"""A stand-in for an OpenAI-compatible server over real HTTP, with speed and faults set by tests.

It answers arithmetic correctly, after the tool calls in `calls`, one turn each, and records the requests. A fault belongs
to a question and is consumed when it occurs, so that a test can specify "429 twice, then success"; `KILL` kills the process
that sent the request in the middle of it.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil

KILL = "kill the client"
HANG_UP = "close the connection"
FOREVER = 1_000


@dataclass(frozen=True)
class Fault:
    """A reply that is not an answer."""

    status: int
    message: str = "no"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class StandIn:
    """The server's behavior and its recorded requests."""

    base_url: str = ""
    latency: float = 0.0
    activations: bool = True
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"id": "stand-in", "revision": "r1", "dtype": "float32", "num_layers": 30, "d_model": 8}
        ]
    )
    models_text: str | None = None
    metrics: str | None = None
    not_ready: int = 0
    calls: list[list[tuple[str, str, str]]] = field(default_factory=list)
    reply: str = "It is {answer}.\nAnswer: {answer}"
    faults: dict[str, list[Fault | str]] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, question: str, *faults: Fault | str, times: int = 1) -> None:
        self.faults[question] = list(faults) * times

    def questions(self) -> list[str]:
        return [question_of(body) for body in self.requests]


def question_of(body: dict[str, Any]) -> str:
    """The text after the last "Problem:" of the last message, or a tool's answer."""
    return str(body["messages"][-1]["content"]).rpartition("Problem: ")[2]


def solve(question: str) -> int:
    terms = re.findall(r"[+-]?\d+", question.replace(" ", ""))
    return sum(map(int, terms))


@contextmanager
def running(stand_in: StandIn) -> Iterator[StandIn]:
    """Serve until the context is left."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/metrics" and stand_in.metrics is not None:
                self.send_text(stand_in.metrics)
            elif self.path == "/metrics":
                self.send({"error": {"message": "no route /metrics"}}, 404)
            elif stand_in.not_ready:
                stand_in.not_ready -= 1
                self.send({"error": {"message": "starting a replica"}}, 503, {"Retry-After": "0.05"})
            elif stand_in.models_text is not None:
                self.send_text(stand_in.models_text)
            elif self.path == "/v1/models":
                self.send({"object": "list", "data": [{"object": "model", **m} for m in stand_in.models]})
            else:
                self.send({"error": {"message": f"no route {self.path}"}}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                return self.send({"count": 10})
            with stand_in.lock:
                stand_in.requests.append({**body, "authorization": self.headers["Authorization"]})
                stand_in.arrived.append(time.monotonic())
                stand_in.in_flight += 1
                stand_in.most_in_flight = max(stand_in.most_in_flight, stand_in.in_flight)
                faults = stand_in.faults.get(question_of(body))
                fault = faults.pop(0) if faults else None
            try:
                time.sleep(stand_in.latency)
                self.answer(body, fault)
            finally:
                with stand_in.lock:
                    stand_in.in_flight -= 1

        def answer(self, body: dict[str, Any], fault: Fault | str | None) -> None:
            if fault == KILL:
                kill_process_behind(self.client_address[1])
            elif fault == HANG_UP:
                self.close_connection = True
            elif isinstance(fault, Fault):
                error = {"message": fault.message, "type": "error", "param": None, "code": fault.code}
                self.send({"error": error}, fault.status, fault.headers)
            elif isinstance(fault, str):  # a 200 with this text as its body
                self.send_text(fault)
            else:
                self.send(completion(stand_in, body))

        def send(self, body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_text(json.dumps(body), status, headers)

        def send_text(self, text: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
            payload = text.encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that a test kills leave broken pipes

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    stand_in.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(stand_in: StandIn, body: dict[str, Any]) -> dict[str, Any]:
    turn = sum(message["role"] == "assistant" for message in body["messages"])
    calls = stand_in.calls[turn] if turn < len(stand_in.calls) else []
    if calls:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None,
            "tool_calls": [wire_call(*call) for call in calls],
        }
    else:
        first = question_of({"messages": body["messages"][:1]})
        message = {"role": "assistant", "content": stand_in.reply.format(answer=solve(first)), "refusal": None}
    reply: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls" if calls else "stop"}
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, **stand_in.usage},
    }
    asked = body.get("activations")
    if asked and stand_in.activations:
        tensor = {
            "format": "stored_tensor",
            "shape": [14, 8],
            "dtype": "float32",
            "stored_path": "shards/1.safetensors",
        }
        reply["activations"] = {
            "session_id": asked["session_id"],
            "rollout_id": f"rollout-{asked['key']['problem_id']}",
            "uri": f"/store/{asked['session_id']}",
            "shard": "shards/1.safetensors",
            "row_start": 0,
            "row_stop": 14,
            "tensors": {f"layers.{layer}.ln_attn": tensor for layer in asked["layers"]},
        }
    return reply


def wire_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def kill_process_behind(port: int) -> None:
    """Kill the process at this port of the connection."""
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.pid not in (None, os.getpid()):
            os.kill(connection.pid, signal.SIGKILL)
