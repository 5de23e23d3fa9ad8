"""`POST /v1/audio/transcriptions`: one recording of any length as text, subtitles, or text with times."""

import asyncio
import copy
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from http import HTTPStatus
from typing import Any, Literal

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.datastructures import FormData, UploadFile

from soundwave.apps.server.errors import ApiError, api_error, sse
from soundwave.apps.server.lanes import GONE, HungUp, Lane
from soundwave.apps.server.served import Served
from soundwave.apps.server.streams import Pieces
from soundwave.modeling_soundwave.transcripts_soundwave import Segment, Transcript
from soundwave.modeling_soundwave.writers_soundwave import to_srt, to_verbose_json, to_vtt
from soundwave.processing import SAMPLING_RATE

logger = logging.getLogger(__name__)

SHORT_S = 60.0  # recordings up to here are worked on in the order of arrival, longer ones between them
PIECE = 4  # windows of a long one that are worked on at once: what others wait for
MAX_PHRASES = 100  # in a prompt
MAX_PHRASE = 100  # characters: what a phrase costs grows with the square of its tokens


class TranscriptionRequest(BaseModel):
    """The fields beside the file."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    language: str | None = Field(None, max_length=40)
    prompt: str = Field("", max_length=2000)
    temperature: float = Field(0, ge=0, le=0)  # decoding is greedy
    stream: bool = False
    granularities: list[Literal["word", "segment"]] = Field([], alias="timestamp_granularities[]")

    @model_validator(mode="before")
    @classmethod
    def _from_form(cls, form: FormData) -> dict[str, Any]:
        """Lists are named with brackets."""
        return {key: form.getlist(key) if key.endswith("[]") else form[key] for key in form.keys() if key != "file"}

    @model_validator(mode="after")
    def _consistent(self) -> "TranscriptionRequest":
        if self.granularities and self.response_format != "verbose_json":
            raise ValueError(f"times need response_format verbose_json, got {self.response_format}")
        if self.stream and self.response_format not in ("json", "text"):
            raise ValueError(f"stream=true needs response_format json or text, got {self.response_format}")
        phrases = self.bias or []
        if len(phrases) > MAX_PHRASES or max(map(len, phrases), default=0) > MAX_PHRASE:
            raise ValueError(
                f"the prompt is likely words between commas, at most {MAX_PHRASES} of them with at most {MAX_PHRASE} "
                f"characters each; got {len(phrases)}, of up to {max(map(len, phrases))}"
            )
        return self

    @property
    def timed(self) -> bool:
        """Whether the words need times."""
        return self.response_format in ("srt", "vtt") or "word" in self.granularities

    @property
    def bias(self) -> list[str] | None:
        """The prompt as likely words: names and phrases between commas or on lines of their own."""
        phrases = [phrase.strip() for phrase in self.prompt.replace("\n", ",").split(",")]
        return [phrase for phrase in phrases if phrase] or None

    def response(self, transcript: Transcript) -> Response:
        """The transcript in the form asked for."""
        match self.response_format:
            case "text":
                return PlainTextResponse(transcript.text + "\n")
            case "srt":
                return PlainTextResponse(to_srt(transcript))
            case "vtt":
                return PlainTextResponse(to_vtt(transcript), media_type="text/vtt")
            case "verbose_json":
                content = to_verbose_json(transcript)
                unwanted = {"words", "segments"} - {f"{name}s" for name in self.granularities or ["segment"]}
                return JSONResponse({key: value for key, value in content.items() if key not in unwanted})
        return JSONResponse({"text": transcript.text})


async def _events(pieces: Pieces) -> AsyncIterator[str]:
    """The text segment by segment, then as a whole."""
    told = False
    async for text in pieces:
        yield sse({"type": "transcript.text.delta", "delta": f" {text}" if told else text})
        told = True
    try:
        transcript = pieces.work.result()
    except Exception as error:
        logger.error("a stream ended early", exc_info=error)
        yield sse(api_error(error).content())
    else:
        yield sse({"type": "transcript.text.done", "text": transcript.text})


class TranscriptionHandler:
    """Transcribes with the served model, in the place of the library's handler."""

    def __init__(self, served: Served):
        self.served = served

    async def handle_request(self, request: Request) -> Response:
        """Answer one request.

        Raises:
            ApiError: for a model that is not served, or a request without a file.
            ValueError: for a request or a recording that cannot be used.
        """
        if not request.headers.get("Content-Type", "").lower().startswith("multipart/form-data"):
            raise ApiError(
                HTTPStatus.BAD_REQUEST, "The request is no multipart/form-data; send the file as a form does."
            )
        async with request.form(max_files=1, max_fields=32) as form:
            asked = TranscriptionRequest.model_validate(form)
            self.served.check_name(asked.model)
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise ApiError(HTTPStatus.BAD_REQUEST, "The form has no file in its field 'file'; send one.")
            content = await file.read()
        waveform = await self.served.lanes.reading(self._short, content)
        if waveform is not None:
            lane, work = self.served.lanes.short, partial(self._transcribe, waveform, asked, self.served.processor)
        else:
            lane, work = self.served.lanes.long, partial(self._transcribe, content, asked, self._in_pieces())
        if asked.stream:
            return await self._stream(lane, work)
        return asked.response(await lane(work))

    async def _stream(self, lane: Lane, work: Callable[..., Transcript]) -> StreamingResponse:
        queue: asyncio.Queue = asyncio.Queue()
        loop, gone = asyncio.get_running_loop(), GONE.get()

        def tell(segment: Segment) -> None:
            if gone.is_set():
                raise HungUp
            loop.call_soon_threadsafe(queue.put_nowait, segment.text)

        pieces = await Pieces(queue, lane(work, tell)).begin()
        return StreamingResponse(_events(pieces), media_type="text/event-stream")

    def _short(self, content: bytes) -> np.ndarray | None:
        """The samples (n,) of a short recording, `None` for a longer one."""
        blocks, samples = [], 0
        for block in self.served.processor.stream_audio(content):
            blocks.append(block)
            samples += len(block)
            if samples > SHORT_S * SAMPLING_RATE:
                return None
        return np.concatenate(blocks)

    def _in_pieces(self) -> Any:
        """A processor that passes the turn on between two blocks of a recording, and stops when the client is gone."""
        whole, gone, turns = self.served.processor, GONE.get(), self.served.lanes.turns

        def stream_audio(source: Any, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
            for block in whole.stream_audio(source, sampling_rate):
                if gone.is_set():
                    raise HungUp
                turns.pass_on()
                yield block

        processor = copy.copy(whole)
        processor.stream_audio = stream_audio
        return processor

    def _transcribe(
        self,
        audio: np.ndarray | bytes,
        asked: TranscriptionRequest,
        processor: Any,
        tell: Callable[[Segment], None] | None = None,
    ) -> Transcript:
        return self.served.model.transcribe(
            audio,
            processor,
            sampling_rate=SAMPLING_RATE if isinstance(audio, np.ndarray) else None,
            timestamps=asked.timed,
            language=asked.language,
            bias=asked.bias,
            windows_per_batch=PIECE if tell is None else 1,  # a stream's text comes window by window
            on_segment=tell,
        )
