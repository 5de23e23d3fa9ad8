"""What a request may ask for, and what clients are told when it asks for something else."""

import io
import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import soundfile
from pydantic import ValidationError
from starlette.datastructures import FormData

from soundwave.apps.server.chat import MAX_RECORDINGS, ChatRequest
from soundwave.apps.server.errors import MAX_MESSAGE, ApiError, api_error
from soundwave.apps.server.lanes import HungUp
from soundwave.apps.server.transcription import TranscriptionRequest
from soundwave.processing import AudioFetchError, AudioLimits, EmptyAudioError
from tests.conftest import SAMPLING_RATE, tone

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tone_file() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(0.5), SAMPLING_RATE, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    "field",
    [
        {"n": 2},
        {"stop": ["the"]},
        {"max_tokens": 0},
        {"max_completion_tokens": "many"},
        {"temperature": 3},
        {"temperature": 1e-30},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"seed": 2**63},
        {"logit_bias": {"1": 1e9}},
        {"logit_bias": {"1": float("nan")}},
        {"logit_bias": {"one": 1}},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"logprobs": True},
        {"modalities": ["text", "audio"]},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"generation_config": "{}"},
        {"chat_template_kwargs": {"chat_template": ""}},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "hello", "tool_calls": []}]},
        {"messages": [{"role": "user", "content": "hello", "name": "me"}]},
    ],
)
def test_what_is_not_done_is_refused_by_name(field):
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"messages": HELLO} | field)
    told = api_error(caught.value)
    assert told.status == 400 and f"{next(iter(field))}" in told.message


def test_values_that_ask_for_nothing_are_taken():
    usual = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "stop": None, "tools": []}
    usual |= {"modalities": ["text"], "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}}
    request = ChatRequest.model_validate({"messages": HELLO, "stream_options": {"include_usage": True}} | usual)
    assert request.conversation(AudioLimits(), threading.Event()) == [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    ]


def test_the_number_of_recordings_is_bounded():
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA"}}
    with pytest.raises(ValidationError, match=f"{MAX_RECORDINGS + 1} recordings"):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": [audio] * (MAX_RECORDINGS + 1)}]})


def test_null_is_no_value():
    answer = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None}  # as clients dump an answer
    request = ChatRequest.model_validate({"messages": [*HELLO, answer], "stream": None, "top_logprobs": None})
    assert request.stream is False and len(request.messages) == 2


def test_one_wrong_part_is_enough():
    """A megabyte of them would become hundreds of megabytes of errors."""
    for messages in ([{"role": "user", "content": [1] * 1000}], [1] * 1000):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate({"messages": messages})
        assert caught.value.error_count() <= 2


def recordings(url: str, number: int) -> ChatRequest:
    part = {"type": "audio_url", "audio_url": {"url": url}}
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": [part] * number}]})


def test_all_recordings_of_a_chat_come_from_the_web_in_the_time_of_one(tone_file):
    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            time.sleep(0.6)
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the one who asked is gone
                self.wfile.write(tone_file)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        limits = AudioLimits(download_timeout_s=1.0, allow_private_addresses=True)
        with pytest.raises(AudioFetchError, match="did not come within"):
            recordings(f"http://127.0.0.1:{server.server_port}/", 2).conversation(limits, threading.Event())
        server.shutdown()


def test_nothing_is_fetched_for_a_client_that_is_gone():
    gone = threading.Event()
    gone.set()
    with pytest.raises(HungUp):
        recordings("http://127.0.0.1:9/", 1).conversation(AudioLimits(), gone)


def test_clients_see_what_they_did_wrong_and_nothing_of_the_inside():
    assert api_error(EmptyAudioError("no samples")).content() == {
        "error": {"message": "no samples", "type": "invalid_request_error", "param": None, "code": None}
    }
    inside = api_error(RuntimeError("a secret path"))
    assert inside.status == 500 and "secret" not in json.dumps(inside.content())
    assert inside.content()["error"]["type"] == "server_error"
    assert len(ApiError(400, "long" * 10_000).content()["error"]["message"]) == MAX_MESSAGE


@pytest.mark.parametrize("prompt", ["漢" * 101, ",".join("ab" * 101)])
def test_the_likely_words_of_a_prompt_are_bounded(prompt):
    """Their cost is paid at every token, and grows with the square of their length."""
    with pytest.raises(ValidationError, match="likely words between commas, at most 100"):
        TranscriptionRequest.model_validate(FormData([("prompt", prompt)]))
    assert TranscriptionRequest.model_validate(FormData([("prompt", "Anna, Garching\nMunich")])).bias[2] == "Munich"
