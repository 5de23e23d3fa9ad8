"""Models behind an OpenAI-compatible endpoint: `soundwave serve` as it is, and a server that fails in every way."""

import base64
import io
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import uvicorn

from soundwave.apps.loading import load_model as load_served
from soundwave.apps.loading import load_processor, resolve_device
from soundwave.apps.server.app import build_app
from soundwave.apps.server.guard import Bounds
from soundwave.apps.server.served import Served
from soundwave.eval import evaluate
from soundwave.eval.items import CutAnswer, FileClip, Item
from soundwave.eval.models import ModelError, ModelUnavailableError, load_model
from soundwave.eval.models.endpoint import Endpoint, input_audio
from soundwave.eval.results import read_results
from tests import tiny_audio_models
from tests.sounds import encoded, noise, tone

TINY = str(Path(__file__).parents[1] / "assets" / "tiny")
KEY = "key-of-this-test"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """URL of `soundwave serve assets/tiny`'s application."""
    device, dtype = resolve_device("cpu", None)
    model = Served(load_served(TINY, device, dtype), load_processor(TINY), TINY, 60, 100)
    server = uvicorn.Server(uvicorn.Config(build_app(model, None, Bounds()), port=0, ws="none", log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(30)
    model.shutdown()


@pytest.fixture
def items(tmp_path) -> list[Item]:
    clips = []
    for index, seconds in enumerate((0.5, 1.0, 1.7)):
        path = tmp_path / f"{index}.wav"
        path.write_bytes(encoded(tone(seconds, 11_025, 200.0 * (index + 1)), 11_025))
        clips.append(FileClip(path))
    two = Item("two", "Transcribe the speech.", clips[:2], None)
    return [Item("one", "Transcribe the speech.", clips[:1], None), two, Item("text", "hello", [], None)] + [
        Item("alone", None, clips[2:], None)
    ]


def test_a_served_model_answers_as_it_does_at_home(served, items):
    endpoint, local = load_model("tiny", endpoint=served), load_model(TINY)
    answers = endpoint.answer(items, 30)
    assert answers == local.answer(items, 30) == [endpoint.answer([item], 30)[0] for item in items]
    assert [type(answer) for answer in endpoint.answer(items, 1)] == [type(a) for a in local.answer(items, 1)]
    assert endpoint.describe() == {
        "name": "tiny",
        "revision": "not told by the server",
        "class": "Endpoint",
        "parameters": None,
        "dtype": None,
        "kind": "endpoint",
        "host": "127.0.0.1",
    }
    assert endpoint.decoding["temperature"] == 0 and items[0].fields["served_model"].startswith("tiny")


def test_an_llm_behind_an_endpoint_completes_a_cascade(served, items, tmp_path):
    recogniser = tiny_audio_models.save_wav2vec2(tmp_path / "wav2vec2")
    remote, local = load_model(recogniser, llm="tiny", endpoint=served), load_model(recogniser, llm=TINY)
    assert remote.answer(items, 10) == local.answer(items, 10)
    assert items[0].fields["transcripts"] and items[0].fields["served_model"]
    about = remote.describe()
    assert about["name"] == "wav2vec2 + tiny" and about["parameters"] is None


def test_a_model_that_is_not_served_ends_the_run(served):
    with pytest.raises(ModelUnavailableError, match="no such model.*'other'"):
        load_model("other", endpoint=served).answer([Item("a", "hello", [], None)], 5)


def test_what_a_server_refuses_is_an_item_that_failed(served):
    with pytest.raises(ModelError, match="item 'a': 127.0.0.1 refuses: .*at most") as refused:
        load_model("tiny", endpoint=served).answer([Item("a", "hello", [], None)], 1_000_000)
    assert not isinstance(refused.value, ModelUnavailableError)


# -- a server that fails


def completion(text: str | None = "fine", finish_reason: str = "stop", **message) -> dict:
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text} | message}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m-2", "choices": [choice]}


class Failing(BaseHTTPRequestHandler):
    """Does what the text of a request says."""

    asked: Counter
    bodies: list[dict]

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1].get("text", "")
        self.asked[text] += 1
        self.bodies.append(body)
        if text == "busy once" and self.asked[text] == 1:
            self.reply(503, {"error": {"message": "overloaded"}})
        elif text == "busy":
            self.reply(500, {"error": {"message": "out of order"}})
        elif text == "bad":
            self.reply(400, {"error": {"message": f"no, {self.headers['Authorization']}, {self.path}"}})
        elif text == "refused":
            self.reply(401, {"error": {"message": f"wrong key {KEY}"}})
        elif text == "slow":
            time.sleep(1.5)
            self.reply(200, completion())
        elif text == "hang up":
            self.close_connection = True
        elif text == "prose":
            self.send(200, b"I am no JSON", "text/html")
        elif text == "half":
            self.send(200, b'{"id": ', "application/json")
        elif text == "other":
            self.reply(200, {"answer": "something else"})
        elif text == "nothing":
            self.reply(200, completion(None))
        elif text == "no choices":
            self.reply(200, completion() | {"choices": []})
        elif text == "policy":
            self.reply(200, completion(None, refusal="I would rather not"))
        elif text == "filtered":
            self.reply(200, completion("half of", "content_filter"))
        elif text == "long":
            self.reply(200, completion(" cut off ", "length"))
        elif text == "empty":
            self.reply(200, completion(""))
        else:
            self.reply(200, completion() | {"system_fingerprint": "fp-1"})

    def reply(self, status: int, body: dict) -> None:
        self.send(status, json.dumps(body).encode(), "application/json")

    def send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def failing() -> Iterator[tuple[str, type[Failing]]]:
    handler = type("Handler", (Failing,), {"asked": Counter(), "bodies": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def server() -> Iterator[tuple[str, type[Failing]]]:
    with failing() as running:
        yield running


def texts(*said: str) -> list[Item]:
    return [Item(text, text, [], None) for text in said]


def test_what_is_sent(server):
    url, handler = server

    class Clip:
        name, duration_s = "a.wav", None

        def read(self) -> np.ndarray:
            return noise(2_000)

    item = Item("a", "What?", [Clip()], None)
    assert Endpoint("m", url).answer([item], 7) == ["fine"]
    (body,) = handler.bodies
    audio, text = body.pop("messages")[0]["content"]
    assert body == {"model": "m", "temperature": 0.0, "max_tokens": 7} and text == {"type": "text", "text": "What?"}
    assert audio["type"] == "input_audio" and audio["input_audio"]["format"] == "wav"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(audio["input_audio"]["data"])), dtype="float32")
    assert rate == 16_000 and samples.shape == (2_000,) and np.abs(samples - noise(2_000)).max() < 1 / 2**22
    assert item.fields == {"served_model": "m-2, fp-1"}


def test_a_busy_server_is_asked_again(server):
    url, handler = server
    assert Endpoint("m", url).answer(texts("busy once"), 5) == ["fine"] and handler.asked["busy once"] == 2
    with pytest.raises(ModelError, match="item 'busy': 127.0.0.1 refuses: InternalServerError.*out of order"):
        Endpoint("m", url, retries=2).answer(texts("busy"), 5)
    assert handler.asked["busy"] == 3


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("bad", "refuses: BadRequestError"),
        ("prose", "sends no completion, but 'I am no JSON'"),
        ("half", "sends no completion"),
        ("other", "sends no completion, but"),
        ("no choices", "sends no completion, but"),
        ("nothing", "sends no text: finish_reason 'stop'"),
        ("policy", "sends no text: I would rather not"),
        ("filtered", "sends no text: finish_reason 'content_filter'"),
        ("slow", "gave no answer within 0.5 s"),
    ],
)
def test_a_reply_that_is_no_answer_names_its_item(server, said, reason):
    with pytest.raises(ModelError, match=f"item '{said}': 127.0.0.1 {reason}") as failed:
        Endpoint("m", server[0], key=KEY, timeout_s=0.5, retries=0).answer(texts("x", said), 5)
    assert not isinstance(failed.value, ModelUnavailableError) and KEY not in str(failed.value)


def test_a_batch_that_failed_costs_nothing_again(server):
    url, handler = server
    endpoint, batch = Endpoint("m", url), texts("a", "b", "bad", "c")
    for part in (batch, batch[:2], batch[2:], batch[3:]):
        if batch[2] in part:
            with pytest.raises(ModelError, match="'bad'"):
                endpoint.answer(part, 5)
        else:
            assert endpoint.answer(part, 5) == ["fine"] * len(part)
    assert handler.asked == {"a": 1, "b": 1, "bad": 1, "c": 1}
    assert endpoint.answer(batch[:1], 5) == ["fine"] and handler.asked["a"] == 2  # asked anew, not remembered for ever


def test_an_answer_may_be_empty_or_cut(server):
    empty, cut = Endpoint("m", server[0]).answer(texts("empty", "long"), 5)
    assert empty == "" and not isinstance(empty, CutAnswer)
    assert cut == "cut off" and isinstance(cut, CutAnswer)


def test_a_refused_key_ends_the_run_and_is_not_told(server):
    with pytest.raises(ModelUnavailableError, match=r"the key is refused.*wrong key \*\*\*"):
        Endpoint("m", server[0], key=KEY).answer(texts("bad", "refused"), 5)


def test_a_server_that_goes_away_ends_the_run():
    with failing() as (url, _):
        endpoint = Endpoint("m", url, retries=0)
        assert endpoint.answer(texts("x"), 5) == ["fine"]
        with pytest.raises(ModelUnavailableError, match="item 'hang up': 127.0.0.1 is away"):
            endpoint.answer(texts("hang up"), 5)
    with pytest.raises(ModelUnavailableError, match="item 'y': 127.0.0.1 is away"):
        endpoint.answer(texts("y"), 5)
    with pytest.raises(ModelUnavailableError, match="no server answers at 127.0.0.1"):
        load_model("m", endpoint=url)


def test_keys_in_the_address_are_in_no_file(server, tmp_path, monkeypatch):
    """Neither in the command, nor in what a server repeats of its own address."""
    rows = [
        {"id": text, "audio": None, "task": "text_qa", "instruction": text, "answer": "fine"} for text in ("x", "bad")
    ]
    data, output = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = server[0].replace("//", "//me:hidden-word@") + "?api-key=hidden-key"
    arguments = ["evaluate", "--model", "m", "--endpoint", url, "--data", str(data), "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["soundwave", *arguments])
    assert evaluate.main(arguments[1:]) == 0
    (entry,) = read_results(output)
    assert "refuses: BadRequestError" in entry["failed"]["bad"] and f"--endpoint {server[0]} " in entry["command"]
    files = [file.read_text() for file in output.rglob("*") if file.is_file()]
    assert len(files) >= 3 and not any("hidden" in text for text in files)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host/v1", "http:///v1"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ModelError, match="no address of an endpoint"):
        Endpoint("m", url)


def test_the_client_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ModelError, match=r"pip install 'soundwave\[eval\]'"):
        load_model("m", endpoint="http://127.0.0.1:9/v1")


def test_samples_beyond_full_scale_are_cut_there():
    data = base64.b64decode(input_audio(np.array([2.0, -2.0, 0.5], np.float32))["input_audio"]["data"])
    assert np.allclose(soundfile.read(io.BytesIO(data))[0], [1, -1, 0.5], atol=1e-6)
