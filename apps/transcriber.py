"""Recordings to transcripts, many at a time: read ahead of the model, batched, the broken ones found."""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from soundwave.apps.inputs import Job, reason, recording
from soundwave.processing import SAMPLING_RATE

HELD_S = 120  # longer recordings are not held in memory: the model reads them as a stream
AHEAD = 2  # batches read while the model is busy


def say(message: str) -> None:
    """One line on stderr, above the progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(f"soundwave transcribe: {message}", file=sys.stderr, flush=True)


class Unreadable(str):
    """What is wrong with a recording."""


def read_ahead(batches: Iterable[list[Job]], processor: Any) -> Iterator[tuple[list[Job], list[Any]]]:
    """Batches of jobs, each with what `read` makes of them: in a thread, so that the model does not wait for disks."""
    pool = ThreadPoolExecutor(1)
    waiting: deque[tuple[list[Job], list[Future]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, [pool.submit(read, job, processor) for job in batch]))
            if len(waiting) > AHEAD:
                jobs, futures = waiting.popleft()
                yield jobs, [future.result() for future in futures]
        for jobs, futures in waiting:
            yield jobs, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read(job: Job, processor: Any) -> Any:
    """Samples (n,) at 16 kHz of a recording; of a long one, what it can be read from; or an `Unreadable`."""
    try:
        source = recording(job)
        if (job.duration or 0) > HELD_S:
            return source
        blocks: list[np.ndarray] = []
        for block in processor.stream_audio(source):
            blocks.append(block)
            if sum(map(len, blocks)) > HELD_S * SAMPLING_RATE:  # its header told less, or nothing
                return source
        return np.concatenate(blocks)
    except Exception as error:  # decoders raise what they like; the others are read all the same
        return Unreadable(reason(error))


class Transcriber:
    """Runs batches of recordings through a model, and finds the broken one when a batch fails."""

    def __init__(self, model: Any, processor: Any, options: Any):
        self._batch_size = options.batch_size
        self._options = options
        self._model = model
        self._processor = processor

    def __call__(self, recordings: Sequence[Any]) -> list[Any]:
        """A transcript for each recording, or a text that says what is wrong with it."""
        results: list[Any] = []
        while len(results) < len(recordings):
            batch = list(recordings[len(results) : len(results) + self._batch_size])
            try:
                results += self._transcripts(batch)
                continue
            except torch.OutOfMemoryError:
                if len(batch) > 1:
                    self._batch_size = len(batch) // 2
                    say(f"out of memory with {len(batch)} recordings at a time; trying {self._batch_size}")
                else:
                    results.append("out of memory with this recording alone; another --dtype or --device may do")
            except Exception as error:  # whatever one recording makes a model raise, the others are done
                results += [reason(error)] if len(batch) == 1 else [result for one in batch for result in self([one])]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # here, where the exception no longer holds its tensors
        return results

    def _transcripts(self, batch: list[Any]) -> list[Any]:
        options = self._options
        if options.ctc_only:
            return self._model.transcribe_ctc(
                batch, self._processor, SAMPLING_RATE, windows_per_batch=self._batch_size
            )
        return self._model.transcribe(
            batch,
            self._processor,
            SAMPLING_RATE,
            timestamps=options.timestamps is not None,
            ctc_draft=options.draft,
            language=options.language,
            bias=options.bias,
            max_new_tokens=options.max_new_tokens,
            windows_per_batch=self._batch_size,
        )
