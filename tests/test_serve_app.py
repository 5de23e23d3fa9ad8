"""The whole application of `soundwave serve` around a random model, without a port."""

import asyncio
import base64
import gc
import io
import json
import threading
from collections.abc import Iterator

import pytest
import soundfile

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
