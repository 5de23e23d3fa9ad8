"""A model behind an OpenAI-compatible chat endpoint: vLLM, llama.cpp, a provider, or ``soundwave serve``.

Recordings go as WAV files in base64 (``input_audio``), in front of the instruction.
"""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import soundfile

from soundwave.eval.items import CutAnswer, Item
from soundwave.eval.models.base import ModelError, ModelUnavailableError, text_of
from soundwave.processing import SAMPLING_RATE

#: Environment variable of the key; servers of one's own often need none.
KEY_VARIABLE = "OPENAI_API_KEY"
_REFUSED = {401: "the key is refused", 403: "access is refused", 404: "no such model or route"}


class Endpoint:
    """A model that answers over HTTP, several items at a time.

    Args:
        model: Its id at the server.
        url: Base of the API, such as ``http://127.0.0.1:8000/v1``.
        key: What the server asks for; ``None``: ``$OPENAI_API_KEY``, if that is set.
        timeout_s: For one request.
        retries: Of a request that timed out, met a busy server or lost its connection; the client waits in between.
        parallel: Requests at a time.

    Raises:
        ModelError: If the client is not installed, or the URL is none.
        ModelUnavailableError: If no server answers there.
    """

    def __init__(
        self,
        model: str,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 300.0,
        retries: int = 4,
        parallel: int = 8,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ModelError("an endpoint needs the openai package: pip install 'soundwave[eval]'") from error
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ModelError(f"{url!r} is no address of an endpoint; expected one like http://127.0.0.1:8000/v1")
        self.model, self._openai, self._parallel = model, openai, parallel
        self.host = urlsplit(url).hostname  # the rest of the address may hold secrets
        key = key or os.environ.get(KEY_VARIABLE)
        self._secrets = list(filter(None, (key, urlsplit(url).query, urlsplit(url).password)))
        self._client = openai.OpenAI(base_url=url, api_key=key or "none", timeout=timeout_s, max_retries=retries)
        self._kept: dict[str, Future[str]] = {}  # request -> what came of it, after a batch that failed
        self.decoding: dict[str, Any] = {"strategy": "greedy", "temperature": 0.0}
        self._check_server()

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        """Greedy answers.

        A batch with an item that fails raises when all others have their answers; what came of each is kept, so that
        asking the same items again in smaller batches costs nothing.
        """
        requests = [self._request(item, max_new_tokens) for item in items]
        digests = [_digest(request) for request in requests]
        with ThreadPoolExecutor(self._parallel) as pool:
            replies = [
                self._kept.pop(digest) if digest in self._kept else pool.submit(self._ask, item, request)
                for item, request, digest in zip(items, requests, digests, strict=True)
            ]
        errors = [error for reply in replies if (error := reply.exception())]
        if not errors:
            return [reply.result() for reply in replies]
        self._kept.update(zip(digests, replies, strict=True))
        raise next((error for error in errors if isinstance(error, ModelUnavailableError)), errors[0])

    def describe(self) -> dict[str, Any]:
        """As ``AudioModel`` says; ``fields["served_model"]`` of an item has what the server told with its answer."""
        return {
            "name": self.model,
            "revision": "not told by the server",
            "class": type(self).__name__,
            "parameters": None,
            "dtype": None,
            "kind": "endpoint",
            "host": self.host,
        }

    def _check_server(self) -> None:
        try:
            self._client.with_options(max_retries=1).models.list()
        except self._openai.APIConnectionError as error:
            raise ModelUnavailableError(f"no server answers at {self.host}: {self._say(error)}") from None
        except self._openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._refusal(error) from None
            # A server without a list of models is a server all the same.
        except (self._openai.OpenAIError, ValueError) as error:
            raise ModelError(f"{self.host} is no OpenAI-compatible endpoint: {self._say(error)}") from None

    def _request(self, item: Item, max_new_tokens: int) -> dict[str, Any]:
        text = text_of(item)
        content: Any = [input_audio(clip.read()) for clip in item.clips]
        content = [*content, *([{"type": "text", "text": text}] if text else [])] if content else text
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.decoding["temperature"],
            "max_tokens": max_new_tokens,
        }

    def _ask(self, item: Item, request: dict[str, Any]) -> str:
        openai, asked = self._openai, f"item {item.id!r}: {self.host}"
        try:
            completion = self._client.chat.completions.create(**request)
        except openai.APITimeoutError:
            raise ModelError(f"{asked} gave no answer within {self._client.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise ModelUnavailableError(f"{asked} is away: {self._say(error)}") from None
        except openai.APIStatusError as error:
            if error.status_code in _REFUSED:
                raise self._refusal(error) from None
            raise ModelError(f"{asked} refuses: {self._say(error)}") from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            raise ModelError(f"{asked} sends no completion: {self._say(error)}") from None
        return self._text(item, completion)

    def _text(self, item: Item, completion: Any) -> str:
        choices = getattr(completion, "choices", None)  # the client passes on whatever JSON it gets
        if not choices or choices[0].message is None:
            raise ModelError(f"item {item.id!r}: {self.host} sends no completion, but {completion!r:.200}")
        text, reason = choices[0].message.content, choices[0].finish_reason
        if text is None or reason == "content_filter":
            refusal = getattr(choices[0].message, "refusal", None)
            raise ModelError(f"item {item.id!r}: {self.host} sends no text: {refusal or f'finish_reason {reason!r}'}")
        item.fields["served_model"] = ", ".join(filter(None, (completion.model, completion.system_fingerprint)))
        return CutAnswer(text.strip()) if reason == "length" else text.strip()

    def _refusal(self, error: Any) -> ModelUnavailableError:
        return ModelUnavailableError(f"{self.host}, {_REFUSED[error.status_code]}: {self._say(error)}")

    def _say(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        for secret in self._secrets:  # some servers repeat what they were sent
            text = text.replace(secret, "***")
        return text


def input_audio(waveform: np.ndarray) -> dict[str, Any]:
    """A content part: (samples,) at 16 kHz as a WAV file in base64.

    Of 24 bits: rounded to 16, a recording that was resampled may be answered otherwise than the same at home.
    """
    file = BytesIO()
    soundfile.write(file, waveform, SAMPLING_RATE, format="WAV", subtype="PCM_24")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def _digest(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
