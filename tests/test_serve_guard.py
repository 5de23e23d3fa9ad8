"""Parts of `soundwave serve` without a model or a port: the guard's bounds in time and memory, the order of work."""

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from soundwave.apps.server.guard import BODIES, MAX_COMMAS, Bounds, Guard
from soundwave.apps.server.lanes import GONE, READERS, Lanes, StopWhenGone, Turns
from tests.conftest import SAMPLING_RATE, tone
from tests.connections import Connection


async def echo(scope, receive, send) -> None:
    """Answer with the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def test_a_body_comes_through_whole():
    async def run() -> None:
        connection, body = Connection(), bytes(range(256)) * 1000
        for start in range(0, len(body), 7777):
            connection.put(body[start : start + 7777], start + 7777 < len(body))
        await connection.start(Guard(echo, None, Bounds()))
        assert connection.status == 200 and connection.sent[1]["body"] == body

    asyncio.run(run())


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "5"}, {"Content-Length": "101"}])
def test_a_body_is_counted_whatever_is_announced(headers):
    async def run() -> None:
        connection = Connection(headers)
        for _ in range(11):
            connection.put(bytes(10), more=True)
        await asyncio.wait_for(connection.start(Guard(echo, None, Bounds(max_body_bytes=100))), 10)
        assert connection.status == 413 and "larger than 100 bytes" in connection.error["message"]

    asyncio.run(run())


def test_a_body_that_does_not_come_is_not_waited_for():
    async def run() -> None:
        connection = Connection()
        connection.put(b"one", more=True)
        await asyncio.wait_for(connection.start(Guard(echo, None, Bounds(body_seconds=0.05))), 10)
        assert connection.status == 408 and "did not come" in connection.error["message"]

    asyncio.run(run())


def test_many_small_values_are_refused_before_they_become_objects():
    async def run() -> None:
        for commas, status in ((MAX_COMMAS, 200), (MAX_COMMAS + 1, 413)):
            connection = Connection()
            connection.put(b'{"messages":[' + b"1," * commas + b"1]}")
            await connection.start(Guard(echo, None, Bounds()))
            assert connection.status == status
        recording = Connection(path="/v1/audio/transcriptions")
        recording.put(b"," * (MAX_COMMAS + 1))
        await recording.start(Guard(echo, None, Bounds()))
        assert recording.status == 200

    asyncio.run(run())


def test_all_bodies_together_are_bounded():
    async def run() -> None:
        guard = Guard(echo, None, Bounds(max_body_bytes=100, queue=100))
        waiting = [Connection() for _ in range(BODIES)]
        tasks = [connection.start(guard) for connection in waiting]
        for connection in waiting:
            connection.put(bytes(100), more=True)
        await asyncio.sleep(0)
        late = Connection()
        late.put(bytes(1))
        await late.start(guard)
        assert late.status == 429 and "memory" in late.error["message"]
        for connection in waiting:
            connection.put(b"")
        await asyncio.gather(*tasks)
        assert {connection.status for connection in waiting} == {200}

    asyncio.run(run())


def test_places_are_counted_and_freed():
    async def run() -> None:
        guard = Guard(echo, None, Bounds(queue=1))
        first, second, third = Connection(), Connection(), Connection()
        tasks = [first.start(guard), second.start(guard)]
        await asyncio.sleep(0)
        await third.start(guard)
        assert third.status == 429 and third.error["code"] == "rate_limit_exceeded"
        assert (b"retry-after", b"5") in third.sent[0]["headers"]
        first.hang_up()
        second.put(b"x")
        await asyncio.gather(*tasks)
        assert not first.sent and second.status == 200
        fourth = Connection()
        fourth.put(b"y")
        await fourth.start(guard)
        assert fourth.status == 200

    asyncio.run(run())


def test_work_ends_when_its_client_is_gone_or_does_not_read():
    gone: list[threading.Event] = []

    async def forever(scope, receive, send) -> None:
        gone.append(GONE.get())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def run() -> None:
        connection = Connection()
        connection.put(b"x")
        task = connection.start(Guard(forever, None, Bounds()))
        while not connection.sent:
            await asyncio.sleep(0)
        assert not gone[0].is_set()
        connection.hang_up()
        await asyncio.wait_for(task, 10)
        assert gone[0].is_set()

        deaf = Connection()
        deaf.put(b"x")
        deaf.send = lambda message: asyncio.Event().wait()  # type: ignore[assignment]
        await asyncio.wait_for(deaf.start(Guard(forever, None, Bounds(send_seconds=0.05))), 10)
        assert gone[1].is_set()

    asyncio.run(run())


@pytest.mark.parametrize(("given", "status"), [(None, 401), ("Bearer wrong", 401), ("k", 401), ("Bearer k", 200)])
def test_keys(given, status):
    async def run() -> None:
        connection = Connection({} if given is None else {"Authorization": given})
        connection.put(b"x")
        await connection.start(Guard(echo, "k", Bounds()))
        assert connection.status == status

    asyncio.run(run())


def wait_for(turns: Turns, number: int) -> None:
    """Until one works and the others of `number` wait."""
    end = time.monotonic() + 30
    while len(turns._waiting) < number and time.monotonic() < end:
        time.sleep(0.001)


def test_turns_are_passed_on_in_the_order_of_asking():
    turns, order, waiting = Turns(), [], []

    def work(name: str) -> None:
        with turns:
            order.append(name)

    with turns:
        with ThreadPoolExecutor(3) as threads:
            for name in "abc":
                waiting.append(threads.submit(work, name))
                wait_for(turns, len(waiting) + 1)
            order.append("first piece")
            turns.pass_on()
            order.append("second piece")
            turns.pass_on()
    assert order == ["first piece", "a", "b", "c", "second piece"]


def test_short_work_is_done_between_the_pieces_of_long_work():
    async def run() -> list[str]:
        lanes, order, begun = Lanes(), [], threading.Event()

        def long() -> None:
            begun.set()
            wait_for(lanes.turns, 2)
            order.append("piece")
            lanes.turns.pass_on()
            order.append("piece")

        first = asyncio.ensure_future(lanes.long(long))
        second = asyncio.ensure_future(lanes.long(order.append, "next long"))
        while not begun.is_set():
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(first, second, lanes.short(order.append, "short")), 30)
        lanes.shutdown()
        return order

    assert asyncio.run(run()) == ["piece", "short", "piece", "next long"]


class Recording:
    """Something that a request holds."""


@pytest.mark.parametrize("lane", ["reading", "fetching", "short", "long"])
def test_what_is_cancelled_before_its_turn_is_never_begun_nor_held(lane):
    async def run() -> None:
        lanes, order, end = Lanes(), [], threading.Event()
        work = getattr(lanes, lane)
        busy = [asyncio.ensure_future(work(end.wait)) for _ in range(READERS)]
        recording = Recording()
        held = weakref.ref(recording)
        second, third = (asyncio.ensure_future(work(order.append, what)) for what in (recording, "third"))
        del recording
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait({second})
        del second
        await asyncio.sleep(0)
        gc.collect()
        assert held() is None and not order
        end.set()
        await asyncio.wait_for(asyncio.gather(*busy, third), 30)
        lanes.shutdown()
        assert order == ["third"]

    asyncio.run(run())


def test_what_is_cancelled_at_work_keeps_its_thread_to_its_end():
    async def run() -> None:
        lanes, begun, end, order = Lanes(), threading.Event(), threading.Event(), []

        def work() -> None:
            begun.set()
            end.wait()
            order.append("first")
            raise ValueError("nobody is there to hear this")

        first = asyncio.ensure_future(lanes.short(work))
        while not begun.is_set():
            await asyncio.sleep(0)
        first.cancel()
        second = asyncio.ensure_future(lanes.short(order.append, "second"))
        await asyncio.sleep(0.01)
        assert lanes.short.pool._work_queue.empty()  # it waits where it can be cancelled
        end.set()
        await asyncio.wait_for(second, 30)
        lanes.shutdown()
        assert order == ["first", "second"]

    asyncio.run(run())


def test_a_generation_stops_when_its_client_is_gone(tiny_model, processor):
    gone = threading.Event()

    class HangsUp(BaseStreamer):
        heard = 0

        def put(self, value: torch.Tensor) -> None:
            self.heard += 1
            if self.heard == 4:  # the prompt and three tokens
                gone.set()

        def end(self) -> None:
            pass

    inputs = processor(audio=tone(0.5), sampling_rate=SAMPLING_RATE)
    ids = tiny_model.generate(
        **inputs, max_new_tokens=50, eos_token_id=-1, streamer=HangsUp(), stopping_criteria=[StopWhenGone(gone)]
    )
    assert ids.shape[1] - inputs["input_ids"].shape[1] in (3, 4)
