"""Who works when: one piece of work on the model at a time, and short requests between the pieces of long ones.

Kinds of work, each with its own threads:

- *reading* and *fetching*: decoding recordings, and getting them from the Web, some at once, beside the model's work;
  whoever waits for the Web keeps nobody from decoding;
- *short*: everything of bounded length, one after the other in the order of arrival;
- *long*: recordings that are read as a stream, one after the other; between two blocks they pass the turn on.

Short and long work take turns at the model, so that a request waits for the short ones before it and for at most one
piece of a long one each, however long that is.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from transformers import StoppingCriteria

logger = logging.getLogger(__name__)

READERS = 4  # requests whose recordings are decoded at once, and as many whose recordings are fetched
# Set when the client of the current request has hung up, or has got its answer.
GONE: ContextVar[threading.Event] = ContextVar("GONE")


class HungUp(Exception):
    """The client is gone: its work ends here."""


class StopWhenGone(StoppingCriteria):
    """Ends a generation whose client is gone."""

    def __init__(self, gone: threading.Event):
        self.gone = gone

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return (B,) bool: which rows are done."""
        return torch.full((len(input_ids),), self.gone.is_set(), dtype=torch.bool, device=input_ids.device)


class Turns:
    """A lock that is passed on in the order of asking."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()  # the first one works

    def __enter__(self) -> None:
        turn = threading.Event()
        with self._lock:
            self._waiting.append(turn)
            self._waiting[0].set()
        turn.wait()

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].set()

    def pass_on(self) -> None:
        """Let those go first who wait."""
        self.__exit__()
        self.__enter__()


class Lane:
    """Threads for one kind of work, which is begun in the order of asking.

    Whoever is cancelled while it waits is gone at once, with the recordings it holds; what is begun keeps its thread
    to its end. (What is cancelled in the queue of a `ThreadPoolExecutor` is held until its turn would have come.)

    Args:
        threads: how many work at once.
        name: of the threads.
        turns: entered by each of them for its work.
    """

    def __init__(self, threads: int, name: str, turns: Turns | None = None):
        self.free = asyncio.Semaphore(threads)
        self.pool = ThreadPoolExecutor(threads, name)
        self.turns = turns or nullcontext()

    async def __call__(self, work: Callable, *arguments: Any) -> Any:
        """Wait for a thread and return what the work returns."""
        await self.free.acquire()
        begun = asyncio.get_running_loop().run_in_executor(self.pool, self._work, work, *arguments)
        begun.add_done_callback(lambda _: self.free.release())
        try:
            return await asyncio.shield(begun)
        except asyncio.CancelledError:
            begun.add_done_callback(_log_failure)  # nobody else will see it
            raise

    def _work(self, work: Callable, *arguments: Any) -> Any:
        with self.turns:
            return work(*arguments)


def _log_failure(work: asyncio.Future) -> None:
    error = None if work.cancelled() else work.exception()
    if error is not None and not isinstance(error, HungUp):
        logger.error("work failed whose client is gone", exc_info=error)


class Lanes:
    """The threads of a server, see above."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.reading = Lane(READERS, "reading")
        self.fetching = Lane(READERS, "fetching")
        self.short = Lane(1, "short", self.turns)
        self.long = Lane(1, "long", self.turns)

    def shutdown(self) -> None:
        """Begin nothing more."""
        for lane in (self.reading, self.fetching, self.short, self.long):
            lane.pool.shutdown(wait=False, cancel_futures=True)
