"""`POST /v1/chat/completions`: conversations with `input_audio`, answered whole or word by word.

The library's handler, with these differences: a request is checked before anything is done for it, recordings come
from the request or from public addresses and never from a path, whatever would be ignored is refused, the only model
is the one loaded at the start, and a client's hang-up ends the generation.
"""

import asyncio
import base64
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.completion_usage import CompletionUsage
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import DirectStreamer, GenerationState

from soundwave.apps.server.errors import api_error, sse
from soundwave.apps.server.lanes import GONE, HungUp, StopWhenGone
from soundwave.apps.server.served import Served, limits_for
from soundwave.apps.server.streams import Pieces
from soundwave.processing import SAMPLING_RATE, AudioLimits, load_audio

Answer = tuple[str, str, CompletionUsage]  # text, reason for its end, tokens
logger = logging.getLogger(__name__)

MAX_TEXT = 100_000  # characters of a conversation
MAX_RECORDINGS = 16  # in a conversation: each costs a window of the encoder, however short it is
# Fields that change nothing in an answer. All others that are not listed below are refused.
IGNORED = {"user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "prompt_cache_key"}


class Strict(BaseModel):
    """What the parts of a request have in common: null is no value, and a field that is not known is refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class TextPart(Strict):
    """A text."""

    type: Literal["text"]
    text: str


class InputAudio(Strict):
    """A file in base64. What it is its content says, whatever `format` does."""

    data: str
    format: str | None = None


class AudioPart(Strict):
    """A recording within the request."""

    type: Literal["input_audio"]
    input_audio: InputAudio

    def source(self) -> bytes:
        """The file: bytes, which cannot name another one."""
        try:
            return base64.b64decode(self.input_audio.data, validate=True)
        except ValueError as error:
            raise ValueError(
                f"The data of input_audio is not valid base64 ({error}); encode a file's bytes."
            ) from error


class AudioUrl(Strict):
    """An address on the Web."""

    url: str = Field(pattern=r"^https?://", max_length=4096)


class AudioUrlPart(Strict):
    """A recording on the Web; the processor's limits say what may be fetched."""

    type: Literal["audio_url"]
    audio_url: AudioUrl

    def source(self) -> str:
        """The address."""
        return self.audio_url.url


Part = Annotated[TextPart | AudioPart | AudioUrlPart, Field(discriminator="type")]


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]

    def parts(self) -> Sequence[Part]:
        """The content as a list."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class ChatRequest(Strict):
    """A conversation, and how to answer it. The model is greedy unless asked otherwise."""

    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    model: str | None = None
    stream: bool = False
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: Literal[0] | Annotated[float, Field(ge=0.01, le=2)] | None = None  # near 0 the scores overflow
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # Known, but only with the value that asks for nothing.
    n: Literal[1] | None = None
    stop: None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logprobs: Literal[False] | None = None
    modalities: tuple[Literal["text"]] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: tuple[()] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if key not in IGNORED} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _bounded(self) -> "ChatRequest":
        parts = [part for message in self.messages for part in message.parts()]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        if (characters := sum(map(len, texts))) > MAX_TEXT:
            raise ValueError(f"the conversation has {characters} characters of text; expected at most {MAX_TEXT}")
        if (recordings := len(parts) - len(texts)) > MAX_RECORDINGS:
            raise ValueError(f"the conversation has {recordings} recordings; expected at most {MAX_RECORDINGS}")
        return self

    def fetches(self) -> bool:
        """Whether something has to come from the Web."""
        return any(isinstance(part, AudioUrlPart) for message in self.messages for part in message.parts())

    def conversation(self, limits: AudioLimits, gone: threading.Event) -> list[dict[str, Any]]:
        """The messages as the processor takes them, their recordings decoded.

        Args:
            limits: length of all recordings together, and time until the last one must have come from the Web.
            gone: ends this between two recordings.
        """
        conversation = []
        deadline = time.monotonic() + limits.download_timeout_s
        for message in self.messages:
            content: list[dict[str, Any]] = []
            for part in message.parts():
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                    continue
                if gone.is_set():
                    raise HungUp
                time_left = max(0.0, deadline - time.monotonic())
                samples = load_audio(part.source(), limits=dataclasses.replace(limits, download_timeout_s=time_left))
                sound_left = limits.max_duration_s - len(samples) / SAMPLING_RATE
                limits = dataclasses.replace(limits, max_duration_s=sound_left)
                content.append({"type": "audio", "audio": samples, "sampling_rate": SAMPLING_RATE})
            conversation.append(
                {"role": "system" if message.role == "developer" else message.role, "content": content}
            )
        return conversation


class ChatHandler(ChatCompletionHandler):
    """Answers conversations with the served model."""

    def __init__(self, served: Served):
        super().__init__(served, GenerationState())
        self.served = served

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        """Answer one request.

        Raises:
            ApiError: for a model that is not served.
            ValueError: for a request, a recording or a prompt that cannot be used.
        """
        request = ChatRequest.model_validate(body)
        self.served.check_name(request.model)
        config = self._generation_config(request)
        limits = limits_for(self.served.max_chat_seconds, self.served.processor.audio_limits)
        read = self.served.lanes.fetching if request.fetches() else self.served.lanes.reading
        messages = await read(request.conversation, limits, GONE.get())
        answer = partial(self._answer, messages, config, request.seed, GONE.get())
        if request.stream:
            return await self._stream(answer, request_id)
        text, reason, usage = await self.served.lanes.short(answer)
        return JSONResponse(self._build_completion(request_id, text, self.served.name, reason, usage))

    def _generation_config(self, request: ChatRequest) -> GenerationConfig:
        asked = {
            "logit_bias": request.logit_bias or None,
            "top_p": request.top_p,
            "temperature": request.temperature or None,
        }
        config = self._build_generation_config(asked, self.served.model.generation_config)
        if request.temperature is not None or request.top_p is not None:
            config.do_sample = request.temperature != 0
        most = self.served.max_new_tokens
        config.max_new_tokens = request.max_completion_tokens or request.max_tokens or most
        if config.max_new_tokens > most:
            raise ValueError(f"The request asks for {config.max_new_tokens} tokens; this server gives {most} at most.")
        return config

    def _answer(
        self,
        messages: list[dict[str, Any]],
        config: GenerationConfig,
        seed: int | None,
        gone: threading.Event,
        streamer: DirectStreamer | None = None,
    ) -> Answer:
        if gone.is_set():
            raise HungUp
        model, processor = self.served.model, self.served.processor
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True).to(model.device)
        if seed is not None:
            torch.manual_seed(seed)  # here, where nobody else draws
        criteria = StoppingCriteriaList([StopWhenGone(gone)])
        ids = model.generate(**inputs, generation_config=config, stopping_criteria=criteria, streamer=streamer)
        prompt = inputs["input_ids"].shape[1]
        new = ids[0, prompt:].tolist()
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        reason = "stop" if new and new[-1] in ends else "length"
        usage = CompletionUsage(prompt_tokens=prompt, completion_tokens=len(new), total_tokens=prompt + len(new))
        return processor.decode(new, skip_special_tokens=True), reason, usage

    async def _stream(self, answer: Callable[..., Answer], request_id: str) -> StreamingResponse:
        queue: asyncio.Queue = asyncio.Queue()
        streamer = DirectStreamer(self.served.processor.tokenizer._tokenizer, asyncio.get_running_loop(), queue)
        pieces = await Pieces(queue, self.served.lanes.short(answer, streamer)).begin()
        return StreamingResponse(self._events(request_id, pieces), media_type="text/event-stream")

    async def _events(self, request_id: str, pieces: Pieces) -> AsyncIterator[str]:
        name, told = self.served.name, ""
        yield self._build_chunk_sse(request_id, role="assistant", model=name)
        async for piece in pieces:
            told += piece
            yield self._build_chunk_sse(request_id, content=piece, model=name)
        try:
            text, reason, usage = pieces.work.result()
        except Exception as error:
            logger.error("a stream ended early", exc_info=error)
            yield sse(api_error(error).content())
        else:
            if len(text) > len(told) and text.startswith(told):  # a character that the limit cut in two
                yield self._build_chunk_sse(request_id, content=text[len(told) :], model=name)
            yield self._build_chunk_sse(request_id, finish_reason=reason, usage=usage, model=name)
        yield "data: [DONE]\n\n"
