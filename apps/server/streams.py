"""An answer piece by piece, while the work on it goes on."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any


class Pieces:
    """What work puts into a queue, as it comes; nothing is lost that came before the work failed.

    Args:
        queue: where the pieces come; empty ones and `None` are passed over.
        work: what puts them there. It is begun here, and given up when nobody iterates any more.
    """

    def __init__(self, queue: asyncio.Queue, work: Coroutine):
        self.queue, self.work = queue, asyncio.ensure_future(work)
        self.work.add_done_callback(queue.put_nowait)

    async def begin(self) -> "Pieces":
        """Wait for the first piece: what fails before it is raised here, to be answered with its own status."""
        try:
            self.first = await self.queue.get()
        except asyncio.CancelledError:
            self.work.cancel()
            raise
        if self.first is self.work:
            self.work.result()
        return self

    async def __aiter__(self) -> AsyncIterator[Any]:
        """The pieces; then the work is done, and its `result()` is there or raises."""
        item = self.first
        try:
            while item is not self.work:
                if item:
                    yield item
                item = await self.queue.get()
        finally:
            self.work.cancel()  # changes nothing once it is done
