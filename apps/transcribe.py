"""Recordings to text: `soundwave transcribe FILES|FOLDER|DATASET...`."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from soundwave.apps.inputs import Job, find_jobs, longest_first, with_duration
from soundwave.apps.loading import load_model, load_processor, resolve_device, resolve_model, revision_of
from soundwave.apps.output import Key, TranscriptLog, claim, merge, part_of, resume, values_of, write_timed
from soundwave.apps.processes import Processes
from soundwave.apps.transcriber import Transcriber, Unreadable, read_ahead, say

# Without an output file lines are printed in the order of the inputs: so many batches are sorted by length together.
SORTED_BATCHES = 16


@dataclass(frozen=True)
class Transcription:
    """What to transcribe, how, and where to; the options of the command."""

    sources: Sequence[str]
    model: str | None = None
    subset: str | None = None
    output: Path | None = None
    timestamps: str | None = None
    output_dir: Path | None = None
    ctc_only: bool = False
    draft: bool = False
    language: str | None = None
    bias: Sequence[str] | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Refuse options that would change nothing."""
        for_llm = ("draft", "language", "bias", "max_new_tokens")
        if self.ctc_only and (given := [f"--{name.replace('_', '-')}" for name in for_llm if getattr(self, name)]):
            raise ValueError(f"--ctc-only loads no LLM, which {', '.join(given)} would steer; leave one of them out")
        if self.output_dir is not None and self.timestamps is None:
            raise ValueError("--output-dir is for the files of --timestamps; give both")


def transcribe(options: Transcription) -> int:
    """Write down what is said in every recording: lines on stdout, or one JSON line each in a file.

    A recording that cannot be read costs one line on stderr, and the others are transcribed all the same.

    Returns:
        The exit code: 1 if a recording failed, else 0.

    Raises:
        ValueError: there is nothing to transcribe, or options exclude each other.
    """
    source = resolve_model(options.model)
    device, dtype = resolve_device(options.device, options.dtype)
    processes = Processes(device)
    if processes.count > 1 and options.output is None:
        raise ValueError("several processes cannot share stdout; give --output FILE.jsonl")
    with ExitStack() as claimed:
        return _transcribe(options, source, dtype, processes, claimed)


def _transcribe(
    options: Transcription, source: str, dtype: torch.dtype, processes: Processes, claimed: ExitStack
) -> int:
    jobs, errors, finished = processes.share(lambda: _plan(options, source, dtype, claimed))
    wanted = {job.key for job in jobs} | {("", name) for name in errors} | finished
    run = _Run(options, processes, [job.name for job in jobs])
    try:
        if processes.rank == 0:
            for name, message in errors.items():
                run.report(Job(name, name, ""), message)
        if jobs:
            if processes.rank == 0:
                say(f"{len(jobs)} to transcribe, on {processes.device} in {_name_of(dtype)}")
            processor = load_processor(source, options.sources)
            model = load_model(source, processes.device, dtype, llm=not options.ctc_only)
            run.all(jobs[processes.rank :: processes.count], processor, Transcriber(model, processor, options))
    finally:
        run.close()
    processes.wait()
    failed: set[Key] = set()
    if processes.rank == 0:
        failed = wanted - (run.finished if options.output is None else merge(options.output))
        if options.output is not None:
            say(f"{len(wanted) - len(failed)} of {len(wanted)} recordings are in {options.output}")
    processes.leave()
    return int(bool(failed))


def _plan(
    options: Transcription, source: str, dtype: torch.dtype, claimed: ExitStack
) -> tuple[list[Job], dict[str, str], set[Key]]:
    """The jobs that are left, what is wrong with sources, and which of the recordings are done."""
    jobs, errors = find_jobs(options.sources, options.subset)
    if not jobs:
        raise ValueError("; ".join(errors.values()) or "the sources hold no recordings")
    if options.output is None:
        return jobs, errors, set()
    settings = {
        "model": source,
        "revision": revision_of(source),
        "dtype": _name_of(dtype),
        "subset": options.subset,
        "ctc_only": options.ctc_only,
        "language": options.language,
        "bias": options.bias,
        "max_new_tokens": options.max_new_tokens,
        "timestamps": options.timestamps,
        "output_dir": str(options.output_dir) if options.output_dir else None,
    }
    keys = {job.key for job in jobs}
    # Not before it is known that there is something to write.
    sidecar = claimed.enter_context(claim(options.output))
    done = resume(options.output, sidecar, settings, keys | {("", name) for name in errors})
    left = [job for job in jobs if job.key not in done]
    timed = tqdm(map(with_duration, left), "lengths", len(left), leave=False, disable=not sys.stderr.isatty())
    return longest_first(timed), errors, done & keys


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).partition(".")[2]


class _Run:
    """What becomes of the results: lines on stdout or in files; and which recordings are finished."""

    def __init__(self, options: Transcription, processes: Processes, names: list[str]):
        self.finished: set[Key] = set()
        self._options = options
        self._named = names != list(options.sources) or len(names) > 1
        self._log = None
        if options.output is not None:
            self._log = TranscriptLog(part_of(options.output, processes.rank, processes.count))
        self._folder = options.output_dir or (options.output.parent if options.output else Path())
        self._quiet = processes.rank > 0 or not sys.stderr.isatty()

    def all(self, jobs: list[Job], processor: Any, transcriber: Transcriber) -> None:
        """Transcribe the jobs, and write each batch before the next one starts."""
        order = deque(job.key for job in jobs)
        lines: dict[Key, str | None] = {}  # not yet printed
        bar = tqdm(total=len(jobs), unit="recording", disable=self._quiet)
        for batch, sources in read_ahead(self._batches(jobs), processor):
            results = iter(transcriber([source for source in sources if not isinstance(source, Unreadable)]))
            for job, source in zip(batch, sources, strict=True):
                lines[job.key] = self.report(job, source if isinstance(source, Unreadable) else next(results))
            if self._log is not None:
                lines.clear()
            while order and order[0] in lines:
                if (line := lines.pop(order.popleft())) is not None:
                    with tqdm.external_write_mode(file=sys.stdout):
                        print(line, flush=True)
            bar.update(len(batch))
        bar.close()

    def report(self, job: Job, result: Any) -> str | None:
        """Write the result of a job where it belongs; the line for stdout, if there is one."""
        if isinstance(result, str):
            message = " ".join(result.split())
            say(message if job.name in message else f"{job.name}: {message}")
            if self._log is not None:
                self._log.append(job, {"error": message})
            return None
        if result.cut:
            say(f"{job.name}: cut at the limit on new tokens; --max-new-tokens raises it")
        if self._options.timestamps is not None:
            try:
                write_timed(self._folder / job.target, result, self._options.timestamps)
            except OSError as error:  # a name too long for the file system; a folder that is a file
                return self.report(job, str(error))
        self.finished.add(job.key)
        if self._log is not None:  # last: what has a line is done
            self._log.append(job, values_of(result))
        text = " ".join(result.text.split())
        return f"{job.name}\t{text}" if self._named else text

    def close(self) -> None:
        """Close the output."""
        if self._log is not None:
            self._log.close()

    def _batches(self, jobs: list[Job]) -> Iterator[list[Job]]:
        size = self._options.batch_size
        sorted_at_once = len(jobs) if self._log is not None else SORTED_BATCHES * size
        for start in range(0, len(jobs), sorted_at_once):
            part = longest_first(map(with_duration, jobs[start : start + sorted_at_once]))
            yield from (part[first : first + size] for first in range(0, len(part), size))
