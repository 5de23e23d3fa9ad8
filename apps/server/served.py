"""The one model of a server."""

import dataclasses
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave.apps.server.errors import ApiError
from soundwave.apps.server.lanes import Lanes
from soundwave.processing import AudioLimits

BYTES_PER_SECOND = 48_000 * 2 * 4  # of decoded sound, float32


def limits_for(seconds: float, limits: AudioLimits) -> AudioLimits:
    """Bounds of recordings of some length, and of the work that decoding them may cause: that of 48 kHz stereo."""
    return dataclasses.replace(limits, max_duration_s=seconds, max_decoded_bytes=int(seconds * BYTES_PER_SECOND))


@dataclass(frozen=True)
class Served:
    """A model, its processor and the threads that work with them.

    Args:
        model: in evaluation mode.
        processor: its `audio_limits` hold for all recordings of clients.
        source: the folder or Hub id it was loaded from; a folder is served under its own name, without the path.
        max_chat_seconds: sound in one conversation, in seconds.
        max_new_tokens: longest answer.
    """

    model: SoundwaveForConditionalGeneration
    processor: SoundwaveProcessor
    source: str
    max_chat_seconds: float
    max_new_tokens: int
    lanes: Lanes = field(default_factory=Lanes)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """What clients call the model."""
        return Path(self.source).resolve().name if Path(self.source).is_dir() else self.source

    def check_name(self, asked: str | None) -> None:
        """Refuse every other model: nothing is loaded for a request."""
        if asked not in (None, self.name, self.source):
            message = f"The model {asked!r} is not served here; this server has {self.name!r} only."
            raise ApiError(HTTPStatus.NOT_FOUND, message, "model_not_found")

    # What the library's application asks of its model manager.

    def get_gen_models(self) -> list[dict[str, Any]]:
        """The list for `/v1/models`."""
        return [{"id": self.name, "object": "model", "created": self.created, "owned_by": "soundwave"}]

    def shutdown(self) -> None:
        """Called when the server stops."""
        self.lanes.shutdown()
