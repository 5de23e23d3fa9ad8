"""Several processes on one list of jobs, one per device, started by accelerate or torchrun."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")


class OtherProcessError(ValueError):
    """Another process failed at what they do together; it says why itself."""


class Processes:
    """This process among those of a launcher; alone without one.

    Args:
        device: where a single process runs; several take a GPU each unless this is `"cpu"`.
    """

    def __init__(self, device: str):
        self.rank, self.count, self.device = 0, 1, device
        self._state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            # The process with the longest recordings may keep the others waiting for hours.
            self._state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
            self.rank, self.count = self._state.process_index, self._state.num_processes
            self.device = device if device == "cpu" else str(self._state.device)

    def together(self, do: Callable[[], T]) -> T:
        """What every process makes for itself. Where one fails all do: none waits for another that is gone.

        Raises:
            OtherProcessError: If only others failed.
        """
        if self._state is None:
            return do()
        from accelerate.utils import gather_object

        made, problem = None, None
        try:
            made = do()
        except Exception as error:  # whatever it is, the others must learn of it
            problem = error
        failed = [rank for rank, fails in enumerate(gather_object([problem is not None])) if fails]
        if problem is not None:
            raise problem
        if failed:
            raise OtherProcessError(f"process {failed[0]} of {self.count} failed; it says why")
        return made  # type: ignore[return-value]

    def share(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; errors as in `together`."""
        made: list[Any] = [self.together(lambda: make() if self.rank == 0 else None)]
        if self._state is not None:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(made)
        return made[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def leave(self) -> None:
        """Until all processes are here, and no longer belong together."""
        if self._state is not None:
            self._state.wait_for_everyone()
            self._state.destroy_process_group()
