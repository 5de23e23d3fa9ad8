"""The library's OpenAI-compatible application around the served model, behind the guard."""

from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from soundwave.apps.server.chat import ChatHandler
from soundwave.apps.server.errors import answer_errors
from soundwave.apps.server.guard import Bounds, Guard
from soundwave.apps.server.served import Served
from soundwave.apps.server.transcription import TranscriptionHandler


def build_app(served: Served, key: str | None, bounds: Bounds) -> Guard:
    """Return the ASGI application.

    The library brings the routes, the request ids and the shapes of the answers; its handlers of other routes are left
    out, and the guard lets nobody reach them.

    Args:
        served: the model.
        key: what clients must send; `None`: nothing.
        bounds: what they may cost.
    """
    app = build_server(
        served,
        ChatHandler(served),
        completion_handler=None,
        response_handler=None,
        transcription_handler=TranscriptionHandler(served),
        systemone_handler=None,
        generation_state=GenerationState(),
    )
    answer_errors(app)
    return Guard(app, key, bounds)
