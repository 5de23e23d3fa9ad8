"""The whole application of `soundwave serve` around a random model, without a port."""

import asyncio
import base64
import gc
import io
import json
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import soundfile

from soundwave.apps.server import transcription
from soundwave.apps.server.app import build_app
from soundwave.apps.server.guard import Bounds, Guard
from soundwave.apps.server.served import Served
from tests.conftest import SAMPLING_RATE, tone
from tests.connections import CHAT, Connection

JSON = {"Content-Type": "application/json"}
TRANSCRIPTIONS = "/v1/audio/transcriptions"


@pytest.fixture
def served(tiny_model, processor) -> Iterator[Served]:
    served = Served(tiny_model, processor, "tiny", max_chat_seconds=20, max_new_tokens=20)
    yield served
    served.shutdown()


@pytest.fixture
def app(served) -> Guard:
    return build_app(served, None, Bounds())


def question(text: str = "Say.", **options) -> Connection:
    file = io.BytesIO()
    soundfile.write(file, tone(0.5), SAMPLING_RATE, format="WAV")
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode()}}
    messages = [{"role": "user", "content": [audio, {"type": "text", "text": text}]}]
    connection = Connection(JSON, CHAT)
    connection.put(json.dumps({"messages": messages} | options).encode())
    return connection


def ask(app: Guard, connection: Connection) -> Connection:
    async def run() -> None:
        await asyncio.wait_for(connection.start(app), 60)

    asyncio.run(run())
    return connection


def recording(seconds: float, **fields: str) -> Connection:
    """A transcription of a recording of several windows, in each of which the random model hears something."""
    file = io.BytesIO()
    samples = np.random.default_rng(0).normal(size=round(seconds * SAMPLING_RATE)).clip(-3, 3) / 10
    soundfile.write(file, samples, SAMPLING_RATE, format="WAV")
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts.append(b'name="file"; filename="a.wav"\r\n\r\n' + file.getvalue())
    connection = Connection({"Content-Type": "multipart/form-data; boundary=b"}, TRANSCRIPTIONS)
    connection.put(
        b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--b--\r\n"
    )
    return connection


def events(connection: Connection) -> list[dict]:
    return [json.loads(event.removeprefix("data: ")) for event in connection.body.decode().split("\n\n")[:-1]]


@pytest.fixture
def third_window(tiny_model) -> Iterator[list]:
    """What to call before the third window is heard."""
    calls, todo = [], []

    def hear(*_) -> None:
        calls.append(1)
        if len(calls) == 3:
            todo[0]()

    with tiny_model.alignment_adapter.register_forward_pre_hook(hear):
        yield todo


def deltas(connection: Connection) -> list[str]:
    events = connection.body.decode().removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]


def test_a_stream_ends_like_the_plain_answer_where_the_limit_cuts_a_character(app, processor):
    ids = processor.tokenizer.encode("漢", add_special_tokens=False)
    assert len(ids) > 1
    options = {"max_tokens": 1, "logit_bias": {str(ids[0]): 100}}
    plain = json.loads(ask(app, question(**options)).body)["choices"][0]
    assert "\ufffd" in plain["message"]["content"] and plain["finish_reason"] == "length"
    assert "".join(deltas(ask(app, question(**options, stream=True)))) == plain["message"]["content"]


def test_an_empty_bias_asks_for_nothing(app):
    assert ask(app, question(logit_bias={}, max_tokens=2)).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_those_who_hang_up_while_they_wait_leave_nothing(app, served, stream):
    """However many come and go while the model is busy with another."""

    async def run() -> None:
        end = threading.Event()
        busy = asyncio.ensure_future(served.lanes.short(end.wait))
        tasks = asyncio.all_tasks()
        for _ in range(3):
            connection = question(stream=stream)
            task = connection.start(app)
            while not served.lanes.short.free._waiters:
                await asyncio.sleep(0.001)
            connection.hang_up()
            await asyncio.wait_for(task, 30)
            while served.lanes.short.free._waiters:
                await asyncio.sleep(0.001)
            assert not connection.sent
        gc.collect()
        assert asyncio.all_tasks() == tasks
        assert served.lanes.short.pool._work_queue.empty()
        end.set()
        await busy
        last = question(max_tokens=2)
        await asyncio.wait_for(last.start(app), 60)
        assert last.status == 200

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/json", ""])
def test_a_transcription_without_a_form_is_not_parsed(app, kind):
    connection = Connection({"Content-Type": kind}, TRANSCRIPTIONS)
    connection.put(b"&" * 1000)
    assert ask(app, connection).status == 400 and "multipart/form-data" in connection.error["message"]


def test_a_form_needs_a_file(app):
    connection = Connection({"Content-Type": "multipart/form-data; boundary=b"}, TRANSCRIPTIONS)
    connection.put(b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nspeech.wav\r\n--b--\r\n')
    assert ask(app, connection).status == 400 and "no file" in connection.error["message"]


@pytest.fixture(params=[7, 5], ids=["short", "long"])
def lane(request, monkeypatch) -> None:
    """Recordings of 7 s are worked on in the order of arrival, or between others."""
    monkeypatch.setattr(transcription, "SHORT_S", request.param)


def test_a_transcript_streams_while_the_rest_is_heard(app, third_window, lane):
    connection, told = recording(7, stream="true"), []

    def wait() -> None:
        until = time.monotonic() + 30
        while not (told or connection.body) and time.monotonic() < until:
            time.sleep(0.001)
        told.append(connection.body)

    third_window.append(wait)
    assert ask(app, connection).status == 200
    assert b"transcript.text.delta" in told[0]
    *parts, whole = events(connection)
    assert {part["type"] for part in parts} == {"transcript.text.delta"} and len(parts) > 1
    assert whole == {"type": "transcript.text.done", "text": "".join(part["delta"] for part in parts)}


def test_a_streamed_transcript_that_fails_ends_with_the_error(app, third_window):
    def fail() -> None:
        raise ValueError("the third window cannot be heard")

    third_window.append(fail)
    *parts, last = events(ask(app, recording(7, stream="true")))
    assert parts and last["error"]["message"] == "the third window cannot be heard"


def test_a_streamed_transcript_ends_with_its_client(app, served, third_window, lane, caplog):
    connection, ends = recording(7, stream="true"), threading.Event()
    third_window.append(lambda: ends.wait(30))
    heard = []

    async def run() -> None:
        task = connection.start(app)
        while not connection.body:
            await asyncio.sleep(0.001)
        connection.hang_up()
        await asyncio.wait_for(task, 30)
        with served.model.alignment_adapter.register_forward_pre_hook(lambda *_: heard.append(1)):
            ends.set()
            await served.lanes.short(int)  # after what is under way
            await served.lanes.long(int)

    asyncio.run(asyncio.wait_for(run(), 60))
    gc.collect()
    assert len(heard) <= 1  # and not all of the others
    assert not caplog.records
