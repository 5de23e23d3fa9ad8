"""`soundwave serve` over loopback: OpenAI's own client, raw sockets where it is too polite, and a real process."""

import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
import soundfile

from tests.conftest import SAMPLING_RATE, tone

ROOT = Path(__file__).parents[1]
KEY = "a-key-of-this-test"
BODY_MB, QUEUE, CHAT_SECONDS, NEW_TOKENS = 8, 8, 20, 100
MIB = 2**20


@dataclass
class Server:
    """A running `soundwave serve`."""

    process: subprocess.Popen
    port: int

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def connect(self, path: str, length: int | None, key: str = KEY) -> socket.socket:
        """A connection that has sent the head of a request; without a length its body comes in chunks."""
        body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(f"{head}\r\n{body}\r\n\r\n".encode())
        return connection


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "soundwave.apps.cli", "serve", "assets/tiny", "--port", str(port)]
    command += ["--max-body-mb", str(BODY_MB), "--queue", str(QUEUE), "--max-chat-seconds", str(CHAT_SECONDS)]
    command += ["--max-new-tokens", str(NEW_TOKENS)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SOUNDWAVE_API_KEY": KEY}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        started = Server(process, port)
        for _ in range(240):
            assert process.poll() is None, "".join(errors)
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail("the server does not listen: " + "".join(errors))
        yield started
        assert process.poll() is None, "".join(errors)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)  # 0 where whoever runs the tests ignores SIGINT
        reader.join(10)
        assert "Traceback" not in "".join(errors), "".join(errors)
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def spoken() -> tuple[list[str], list[bytes]]:
    """Held-out sentences as WAV files: (texts, files)."""
    pytest.importorskip("espeakng_loader", reason="speech is synthesized with espeak-ng")
    from soundwave.training.tiny.grammar import draw_split
    from soundwave.training.tiny.synthesizer import UNSEEN_VOICES
    from soundwave.training.tiny.utterances import Job, speak

    texts = [sentence.text for sentence in draw_split(random.Random(5), "test", 8, distinct=True)]
    jobs = [Job(f"u{i}", (text,), UNSEEN_VOICES[i % len(UNSEEN_VOICES)], i, False) for i, text in enumerate(texts)]
    return texts, [encoded(speak(job).samples) for job in jobs]


def encoded(samples: np.ndarray, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format=kind)
    return file.getvalue()


def question(file: bytes, kind: str = "wav", text: str = "Transcribe the speech.") -> list:
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(file).decode(), "format": kind}}
    return [{"role": "user", "content": [audio, {"type": "text", "text": text}]}]


def transcribe(server: Server, file: bytes, **options):
    return server.client().audio.transcriptions.create(**{"model": "tiny", "file": ("speech.wav", file)} | options)


def chat(server: Server, messages: list, **options):
    return server.client().chat.completions.create(**{"model": "tiny", "messages": messages} | options)


def still_answers(server: Server) -> bool:
    return isinstance(transcribe(server, encoded(tone(0.5))).text, str)


def test_chat_hears_the_words(server, spoken):
    texts, files = spoken
    for text, file in list(zip(texts, files, strict=True))[:3]:
        answer = chat(server, question(file))
        assert answer.choices[0].message.content == text
        assert answer.choices[0].finish_reason == "stop" and answer.model == "tiny"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_chat_takes_other_formats(server, spoken, kind):
    samples = soundfile.read(io.BytesIO(spoken[1][0]), dtype="float32")[0]
    assert chat(server, question(encoded(samples, kind), kind.lower())).choices[0].message.content == spoken[0][0]


def test_a_streamed_chat_is_the_plain_one_piece_by_piece(server, spoken):
    messages = question(spoken[1][0])
    chunks = list(chat(server, messages, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces) == chat(server, messages).choices[0].message.content == spoken[0][0]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"


def test_an_answer_at_its_limit_says_so(server, spoken):
    answer = chat(server, question(spoken[1][0]), max_tokens=2)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 2


def test_sampling_follows_the_seed_and_greedy_is_the_default(server, spoken):
    options = {"temperature": 2.0, "seed": 3, "max_tokens": 12}
    first, second = (chat(server, question(spoken[1][0], text="Go."), **options) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert chat(server, question(spoken[1][0]), temperature=0).choices[0].message.content == spoken[0][0]


def test_transcripts_in_every_form(server, spoken):
    text, file = spoken[0][0], spoken[1][0]
    assert transcribe(server, file).text == text
    assert transcribe(server, file, response_format="text").strip() == text
    srt = transcribe(server, file, response_format="srt")
    assert srt.startswith("1\n00:00:00,") and " --> 00:00:0" in srt and text in " ".join(srt.split())
    vtt = transcribe(server, file, response_format="vtt")
    assert vtt.startswith("WEBVTT\n") and text in " ".join(vtt.split())
    verbose = transcribe(server, file, response_format="verbose_json")
    seconds = len(soundfile.read(io.BytesIO(file))[0]) / SAMPLING_RATE
    assert verbose.text == text and verbose.words is None
    assert float(verbose.duration) == pytest.approx(seconds, abs=0.01)
    assert [segment.text.strip() for segment in verbose.segments] == [text]


def test_words_have_times(server, spoken):
    options = {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]}
    verbose = transcribe(server, spoken[1][0], **options)
    assert [word.word.strip() for word in verbose.words] == spoken[0][0].split()
    times = [time for word in verbose.words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= float(verbose.duration)
    assert verbose.segments


def test_a_transcript_streams(server, spoken):
    events = list(transcribe(server, spoken[1][0], stream=True))
    assert "".join(event.delta for event in events[:-1]) == spoken[0][0]
    assert events[-1].type == "transcript.text.done" and events[-1].text == spoken[0][0]


def test_hints_are_taken(server, spoken):
    verbose = transcribe(server, spoken[1][0], language="en", prompt="garage, blue", response_format="verbose_json")
    assert verbose.language == "en" and isinstance(verbose.text, str)


def test_a_long_recording_is_transcribed_beside_short_ones(server, spoken):
    """Over a minute: read as a stream, in pieces between which others get their turn."""
    parts = [soundfile.read(io.BytesIO(file), dtype="float32")[0] for file in spoken[1]]
    pause = np.zeros(SAMPLING_RATE, dtype=np.float32)
    samples = np.concatenate([piece for part in parts * 4 for piece in (part, pause)])
    assert len(samples) > 61 * SAMPLING_RATE
    with ThreadPoolExecutor(4) as threads:
        long = threads.submit(transcribe, server, encoded(samples), response_format="verbose_json")
        short = [threads.submit(transcribe, server, file) for file in spoken[1][:3]]
        assert [answer.result().text for answer in short] == spoken[0][:3]
        heard = long.result()
    expected = " ".join(spoken[0] * 4).split()
    assert len(heard.segments) > 1 and float(heard.duration) == pytest.approx(len(samples) / SAMPLING_RATE, abs=0.1)
    assert abs(len(heard.text.split()) - len(expected)) <= len(expected) // 10


def test_eight_at_once_answer_as_one_after_the_other(server, spoken):
    alone = [transcribe(server, file).text for file in spoken[1]]
    alone += [chat(server, question(file)).choices[0].message.content for file in spoken[1]]
    with ThreadPoolExecutor(8) as threads:
        heard = list(threads.map(lambda file: transcribe(server, file).text, spoken[1]))
        asked = list(threads.map(lambda file: chat(server, question(file)), spoken[1]))
    assert heard + [answer.choices[0].message.content for answer in asked] == alone
    assert alone[:8] == spoken[0]


def test_models_and_health(server):
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b"200 OK" in connection.recv(4096)
    assert isinstance(transcribe(server, encoded(tone(0.5)), model="assets/tiny").text, str)


@pytest.mark.parametrize(("key", "said"), [("wrong", "a wrong API key"), ("", "no API key")])
def test_the_key_is_asked_for(server, key, said):
    client = (
        server.client(key)
        if key
        else openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused", max_retries=0, timeout=60)
    )
    headers = {} if key else {"Authorization": openai.Omit()}
    with pytest.raises(openai.AuthenticationError, match=said):
        client.models.list(extra_headers=headers)
    with pytest.raises(openai.AuthenticationError, match=said):
        client.chat.completions.create(model="tiny", messages=question(b""), extra_headers=headers)


@pytest.mark.parametrize("path", ["load_model", "reset", "v1/completions", "v1/responses", "docs", "openapi.json"])
def test_the_librarys_other_routes_are_closed(server, path):
    client = server.client().with_options(base_url=f"http://127.0.0.1:{server.port}")
    with pytest.raises(openai.NotFoundError, match="There is no"):
        client.post(f"/{path}", cast_to=object, body={"model": "openai/whisper-tiny"})


def test_other_models_are_not_loaded(server, spoken):
    with pytest.raises(openai.NotFoundError, match="'openai/whisper-tiny' is not served here"):
        transcribe(server, spoken[1][0], model="openai/whisper-tiny")
    with pytest.raises(openai.NotFoundError, match="'tiny' only"):
        chat(server, question(spoken[1][0]), model="openai/whisper-tiny")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "input_audio", "input_audio": {"data": "file:///etc/passwd", "format": "wav"}}, "not valid base64"),
        ({"type": "input_audio", "input_audio": {"data": "README.md"}}, "not valid base64"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "0 bytes"),
        ({"type": "input_audio", "input_audio": {"data": "bm8gYXVkaW8=", "format": "wav"}}, "cannot be decoded"),
        ({"type": "input_audio", "input_audio": {"path": "README.md"}}, "input_audio.data: Field required"),
        ({"type": "audio", "path": "README.md"}, "'text', 'input_audio', 'audio_url'"),
        ({"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}}, "should match pattern"),
        ({"type": "audio_url", "audio_url": {"url": "/etc/passwd"}}, "should match pattern"),
        ({"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:{port}/health"}}, "no public address"),
        ({"type": "audio_url", "audio_url": {"url": "http://localhost:{port}/health"}}, "no public address"),
        ({"type": "text", "text": "a" * 100_001}, "100001 characters"),
    ],
)
def test_what_a_chat_may_not_hold(server, part, said):
    part = json.loads(json.dumps(part).replace("{port}", str(server.port)))
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=said):
            chat(server, [{"role": "user", "content": [part]}], stream=stream)


def test_what_would_be_ignored_is_refused(server):
    messages = question(encoded(tone(0.5)))
    for options, said in (
        ({"stop": "the"}, "stop: "),
        ({"max_tokens": NEW_TOKENS + 1}, f"gives {NEW_TOKENS} at most"),
        ({"logit_bias": {"999999999": 5}}, "vocabulary"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config: "),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            chat(server, messages, **options)


def test_a_chat_has_its_length_of_sound_in_all(server):
    half = question(encoded(tone(0.6 * CHAT_SECONDS)))
    with pytest.raises(openai.BadRequestError, match=r"expected at most 8 s"):
        chat(server, half + [{"role": "assistant", "content": "yes"}] + half)


def test_broken_recordings_are_named(server, spoken):
    for file, said in (
        (b"", "0 bytes"),
        (b"no audio at all", "cannot be decoded"),
        (spoken[1][0][:-20000], "cut off"),
    ):
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            transcribe(server, file)
        assert caught.value.type == "invalid_request_error" and "Traceback" not in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="no multipart/form-data"):
        server.client().post("/audio/transcriptions", cast_to=object, body={"model": "tiny"})


def test_what_a_transcript_cannot_be(server):
    for options, said in (
        ({"response_format": "diarized_json"}, "response_format: "),
        ({"temperature": 0.5}, "temperature: "),
        ({"include": ["logprobs"]}, "include"),
        ({"timestamp_granularities": ["word"]}, "times need response_format verbose_json"),
        ({"stream": True, "response_format": "srt"}, "stream=true needs"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            transcribe(server, encoded(tone(0.5)), **options)


def grown(server: Server, work) -> int:
    """How many bytes the server's memory grows at most while something is done."""
    process, stop, sizes = psutil.Process(server.process.pid), threading.Event(), []
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.005):
            sizes.append(process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()
    return max(sizes, default=before) - before


def test_a_large_body_is_refused_before_it_fills_the_memory(server):
    def announced() -> None:
        with pytest.raises(openai.APIStatusError, match=f"larger than {BODY_MB * MIB} bytes") as caught:
            transcribe(server, bytes(100 * MIB))
        assert caught.value.status_code == 413

    def in_chunks() -> None:
        with server.connect("/v1/chat/completions", None) as connection:
            try:
                for _ in range(100):
                    connection.sendall(b"%x\r\n" % MIB + bytes(MIB) + b"\r\n")
            except OSError:
                pass  # the server has heard enough
            assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")

    assert grown(server, announced) < BODY_MB * MIB
    assert grown(server, in_chunks) < 4 * BODY_MB * MIB
    assert still_answers(server)


def test_those_who_find_the_queue_full_are_told_when_to_come_again(server):
    waiting = [server.connect("/v1/chat/completions", 1000) for _ in range(QUEUE + 1)]
    try:
        with pytest.raises(openai.RateLimitError, match=f"{QUEUE} requests wait already") as caught:
            for _ in range(100):  # until the server has seen them all
                transcribe(server, encoded(tone(0.5)))
        assert int(caught.value.response.headers["Retry-After"]) > 0
        assert server.client().models.list().data  # not a piece of work
    finally:
        for connection in waiting:
            connection.close()
    for _ in range(100):
        try:
            assert still_answers(server)
            break
        except openai.RateLimitError:
            time.sleep(0.05)
    else:
        pytest.fail("those who hung up kept their places")


def test_hanging_up_in_mid_body_harms_nobody(server):
    for _ in range(3 * QUEUE):
        with server.connect("/v1/audio/transcriptions", 100_000) as connection:
            connection.sendall(bytes(50_000))
    assert still_answers(server)


def test_hanging_up_in_mid_answer_harms_nobody(server, spoken):
    endless = {"logit_bias": {"2": -100.0}, "stream": True, "max_tokens": NEW_TOKENS}
    for _ in range(QUEUE + 2):
        with chat(server, question(spoken[1][0]), **endless) as stream:
            assert next(iter(stream)).choices[0].delta.role == "assistant"
    assert transcribe(server, spoken[1][1]).text == spoken[0][1]
