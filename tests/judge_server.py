"""A chat completions server on this machine that says what a test tells it to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str | None, **message: Any) -> bytes:
    """The body of a chat completion."""
    choice = {
        "index": 0,
        "finish_reason": message.pop("finish_reason", "stop"),
        "message": {"role": "assistant", "content": text, **message},
    }
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-2024-01-01", "choices": [choice]}
    return json.dumps(body).encode()


@dataclass
class JudgeServer:
    """What a server was asked, and how it is to answer.

    Attributes:
        answer: Body of a request -> (status, body of the response, seconds to wait before).
        requests: Bodies in the order of their arrival.
        keys: Their authorization headers.
    """

    answer: Callable[[dict[str, Any]], tuple[int, bytes, float]]
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""

    def say(self, text: str | Callable[[str], str]) -> None:
        """Answer every request with a text, or with what a function makes of the last message."""
        said = text if callable(text) else lambda _: text
        self.answer = lambda request: (200, completion(said(request["messages"][-1]["content"])), 0.0)


@contextmanager
def judge_server(text: str | Callable[[str], str] = "7 8") -> Iterator[JudgeServer]:
    """A running server that says ``text`` until it is told otherwise."""
    state = JudgeServer(lambda request: (500, b"", 0.0))
    state.say(text)
    stopping = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append(request)
            state.keys.append(self.headers["Authorization"])
            status, body, wait_s = state.answer(request)
            if stopping.wait(wait_s):
                return
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("retry-after-ms", "1")  # the client then waits no longer than that
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the client has given up

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
