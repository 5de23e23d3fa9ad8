"""Requests to an ASGI application, without a port."""

import asyncio
import json
from collections.abc import Callable

CHAT = "/v1/chat/completions"


class Connection:
    """One request as a server would hand it to the application: its pieces come when they are put into `pieces`."""

    def __init__(self, headers: dict[str, str] | None = None, path: str = CHAT):
        headers_ = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": headers_, "query_string": b""}
        self.pieces: asyncio.Queue = asyncio.Queue()
        self.sent: list[dict] = []

    def put(self, body: bytes, more: bool = False) -> None:
        self.pieces.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def hang_up(self) -> None:
        self.pieces.put_nowait({"type": "http.disconnect"})

    async def send(self, message: dict) -> None:
        self.sent.append(message)

    def start(self, app: Callable) -> asyncio.Task:
        return asyncio.ensure_future(app(self.scope, self.pieces.get, self.send))

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def error(self) -> dict:
        return json.loads(self.body)["error"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)
