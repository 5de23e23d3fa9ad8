"""The door of the server, plain ASGI: who may come in, with how much, and how many at once.

Nothing is read for a request that is refused. A body is counted as it comes, whatever its header says. A client that
hangs up frees its place, and its work ends.
"""

import asyncio
import hmac
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from soundwave.apps.server.errors import ApiError
from soundwave.apps.server.lanes import GONE, HungUp

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = "/health"
CHAT = "/v1/chat/completions"
PATHS = (CHAT, "/v1/audio/transcriptions", "/v1/models", HEALTH)
CHUNK = 2**16  # bytes of a body handed on at once
MAX_COMMAS = 100_000  # in a chat's JSON: a megabyte of wrong values becomes hundreds of them as errors
BODIES = 8  # full-sized ones held in memory at once
RETRY_AFTER = 5  # seconds


@dataclass(frozen=True)
class Bounds:
    """What a client may cost."""

    max_body_bytes: int = 64 * 2**20
    queue: int = 64  # requests that wait while one is worked on
    body_seconds: float = 120.0  # until a body must have come
    send_seconds: float = 60.0  # until a client must have taken a piece of its answer


class Guard:
    """Lets requests through to an application.

    Args:
        app: the application.
        key: what clients send as `Authorization: Bearer KEY`; `None`: nothing.
        bounds: see `Bounds`.
    """

    def __init__(self, app: App, key: str | None, bounds: Bounds):
        self.app, self.bounds = app, bounds
        self._authorization = None if key is None else f"Bearer {key}".encode()
        self._held: dict[object, int] = {}  # bytes of body by request inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._admit(scope)
            if scope["method"] == "POST":
                await self._with_place(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except HungUp:
            pass

    def _admit(self, scope: Scope) -> None:
        if scope["path"] not in PATHS:
            raise ApiError(HTTPStatus.NOT_FOUND, f"There is no {scope['path']} here; there are {', '.join(PATHS)}.")
        if scope["path"] == HEALTH or self._authorization is None:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._authorization):
            said = "a wrong API key" if given else "no API key"
            message = f"The request has {said}; send the server's as 'Authorization: Bearer KEY'."
            raise ApiError(HTTPStatus.UNAUTHORIZED, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    async def _with_place(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self._held) > self.bounds.queue:
            raise self._busy(f"{self.bounds.queue} requests wait already")
        place = object()
        self._held[place] = 0
        try:
            await self._work(scope, await self._body(scope, receive, place), receive, send)
        finally:
            del self._held[place]

    @staticmethod
    def _busy(why: str) -> ApiError:
        return ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"The server is busy: {why}. Try again later.",
            "rate_limit_exceeded",
            {"Retry-After": str(RETRY_AFTER)},
        )

    async def _body(self, scope: Scope, receive: Receive, place: object) -> bytearray:
        """Read the body, as much as is allowed."""
        most = self.bounds.max_body_bytes
        too_large = ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is larger than {most} bytes; send a shorter or compressed recording.",
        )
        if int(dict(scope["headers"]).get(b"content-length", 0)) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.bounds.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HungUp
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    self._held[place] = len(body)
                    if len(body) > most:
                        raise too_large
                    if sum(self._held.values()) > BODIES * most:
                        raise self._busy("the bodies of other requests fill its memory")
        except TimeoutError:
            late = f"The body did not come within {self.bounds.body_seconds:g} seconds."
            raise ApiError(HTTPStatus.REQUEST_TIMEOUT, late, headers={"Connection": "close"}) from None
        if scope["path"] == CHAT and body.count(b",") > MAX_COMMAS:
            many = f"The JSON has more than {MAX_COMMAS} values; send recordings in base64, and shorter texts."
            raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, many)
        return body

    async def _work(self, scope: Scope, body: bytearray, receive: Receive, send: Send) -> None:
        """Run the application until it has answered or the client is gone."""

        async def replay() -> MutableMapping[str, Any]:
            nonlocal body
            if body is None:
                await asyncio.Event().wait()  # the application's own watch for a hang-up; this one's cancels it
            chunk = bytes(body[:CHUNK])
            del body[:CHUNK]
            more = bool(body)
            if not more:
                body = None  # type: ignore[assignment]
            return {"type": "http.request", "body": chunk, "more_body": more}

        async def send_in_time(message: MutableMapping[str, Any]) -> None:
            async with asyncio.timeout(self.bounds.send_seconds):
                await send(message)

        async def hang_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        gone = threading.Event()
        GONE.set(gone)
        work = asyncio.ensure_future(self.app(scope, replay, send_in_time))
        watch = asyncio.ensure_future(hang_up())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.set()
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)  # the application has logged its own errors
