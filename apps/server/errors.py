"""Every refusal and failure as OpenAI's clients know it: `{"error": {"message", "type", "param", "code"}}`."""

import json
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

MAX_MESSAGE = 1000  # characters
INTERNAL = "The server failed at this request; its log says why."


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        message: what was given, what is expected, what to do.
        code: OpenAI's word for it, where it has one.
        headers: further headers of the answer.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": self.message[:MAX_MESSAGE], "type": kind, "param": None, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.content(), self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """What the client is told of an error: the message of a `ValueError`, and nothing of what went wrong inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, ValidationError | RequestValidationError):
        problems = [".".join(map(str, one["loc"])) + ": " + one["msg"] for one in error.errors()[:3]]
        return ApiError(HTTPStatus.BAD_REQUEST, "The request cannot be used: " + "; ".join(problems).lstrip(": "))
    if isinstance(error, ValueError):
        return ApiError(HTTPStatus.BAD_REQUEST, str(error))
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL)


def answer_errors(app: FastAPI) -> None:
    """Give all errors of an application their shape."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        told = api_error(error)
        if told.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("a request failed", exc_info=error)
        return told.response()

    for kind in (ApiError, HTTPException, RequestValidationError, ValueError, Exception):
        app.add_exception_handler(kind, answer)


def sse(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
