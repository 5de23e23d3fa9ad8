"""Answers in batches of items of similar length; a batch that fails is taken apart until the broken item is alone."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from soundwave.eval.provenance import portable_address

T = TypeVar("T")


class Answered(NamedTuple, Generic[T]):
    """An item with its answer, or with what went wrong."""

    item: T
    answer: str | None
    error: Exception | None


def longest_first(items: Sequence[T], length: Callable[[T], object]) -> list[T]:
    """The longest first, so that too large a batch fails at once and not at the end; the first of equals first."""
    return sorted(items, key=length, reverse=True)  # type: ignore[arg-type]


def answer_in_batches(
    answer: Callable[[list[T]], Sequence[str]],
    items: Sequence[T],
    batch_size: int,
    say: Callable[[str], None] = lambda message: None,
    fatal: tuple[type[Exception], ...] = (),
) -> Iterator[list[Answered[T]]]:
    """Answers of every item once, in the order of the items, as soon as a batch has them.

    Any error of a model belongs to an item: its batch is halved and asked again until the item is alone. Where the
    memory was too small for a batch, the batches after it are as small as the half that it was.

    Args:
        answer: A batch of items in, one text per item out.
        items: Sorted by length (``longest_first``).
        batch_size: Items per batch.
        say: Gets a line when the batches become smaller.
        fatal: Errors that belong to no item and go through, as ``KeyboardInterrupt`` does.
    """

    def attempt(batch: list[T]) -> tuple[list[Answered[T]] | None, Exception | None]:
        try:
            return _checked(answer(batch), batch), None
        except fatal:
            raise
        except Exception as error:  # decoders and models raise whatever they like; nothing is lost, it is in the files
            return None, error

    start = 0
    while start < len(items):
        batch = list(items[start : start + batch_size])
        done, error = attempt(batch)
        if error is not None and len(batch) > 1 and out_of_memory(error):
            batch_size = len(batch) // 2
            say(f"out of memory with {len(batch)} items at once; going on with batches of {batch_size}")
            error = None  # its traceback holds the tensors
            clear_device_cache(garbage_collection=True)
            continue
        yield from [done] if done is not None else _apart(attempt, batch, error)
        start += len(batch)


def _apart(attempt: Callable[[list[T]], Any], batch: list[T], error: Exception | None) -> Iterator[list[Answered[T]]]:
    """Answers of a batch that failed, by halves; the error is the item's that is left alone with it."""
    if len(batch) == 1:
        yield [Answered(batch[0], None, error)]
        return
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        done, error = attempt(half)
        yield from [done] if done is not None else _apart(attempt, half, error)


def _checked(texts: Sequence[str], batch: list[T]) -> list[Answered[T]]:
    if len(texts) != len(batch):
        raise ValueError(f"the model gave {len(texts)} answers to {len(batch)} items; expected one each")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"the model answered with a {type(text).__name__} ({text!r:.60}), expected text")
    return [Answered(item, text, None) for item, text in zip(batch, texts, strict=True)]


def out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may fit."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def describe_error(error: Exception) -> str:
    """An error in one line, for the files: without the keys in an address."""
    return shortened(portable_address(" ".join(f"{type(error).__name__}: {error}".split())))


def shortened(reason: str) -> str:
    """A reason in one line of at most 1,000 characters; what is too long for a file's name keeps its end."""
    words = (word if len(word) <= 300 else f"…{word[-100:]}" for word in reason.split())
    return textwrap.shorten(" ".join(words), 1000, placeholder=" …")


__all__ = ["Answered", "answer_in_batches", "describe_error", "longest_first", "out_of_memory", "shortened"]
