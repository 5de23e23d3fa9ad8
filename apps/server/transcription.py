"""`POST /v1/audio/transcriptions`: one recording of any length as text, subtitles, or text with times."""

import copy
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from typing import Any, Literal

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.datastructures import FormData, UploadFile

from soundwave.apps.server.errors import ApiError, sse
from soundwave.apps.server.lanes import GONE, HungUp
from soundwave.apps.server.served import Served
from soundwave.modeling_soundwave.transcripts_soundwave import Transcript
from soundwave.modeling_soundwave.writers_soundwave import to_srt, to_verbose_json, to_vtt
from soundwave.processing import SAMPLING_RATE

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
        if self.stream:
            return StreamingResponse(_events(transcript), media_type="text/event-stream")
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


async def _events(transcript: Transcript) -> AsyncIterator[str]:
    """The text by segments, once it is known as a whole."""
    texts = [segment.text for segment in transcript.segments if segment.text]
    for index, text in enumerate(texts):
        yield sse({"type": "transcript.text.delta", "delta": f" {text}" if index else text})
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
            transcript = await self.served.lanes.short(self._transcribe, waveform, asked, self.served.processor)
        else:
            transcript = await self.served.lanes.long(self._transcribe, content, asked, self._in_pieces())
        return asked.response(transcript)

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

    def _transcribe(self, audio: np.ndarray | bytes, asked: TranscriptionRequest, processor: Any) -> Transcript:
        return self.served.model.transcribe(
            audio,
            processor,
            sampling_rate=SAMPLING_RATE if isinstance(audio, np.ndarray) else None,
            timestamps=asked.timed,
            language=asked.language,
            bias=asked.bias,
            windows_per_batch=PIECE,
        )
