"""What to transcribe: files, folders, URLs and data sets as one list of jobs, and their recordings."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import soundfile

# What a folder is searched for; a file that is named itself may have any suffix.
AUDIO_SUFFIXES = frozenset(
    ".aac .aif .aiff .au .caf .flac .m4a .mp3 .oga .ogg .opus .w64 .wav .webm .wma".split()  # fmt: skip
)
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SAVED_DATASET = ("state.json", "dataset_dict.json")  # a folder that `save_to_disk` wrote holds one of them
AUDIO_COLUMNS = ("audio", "path")  # the first that a data set has holds its recordings
MP3_BYTES_PER_S = 16_000  # at 128 kbit/s: good enough to sort by
URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """One recording to transcribe. Plain values: a list of jobs is small and can be sent to another process."""

    name: str  # as the user knows it: path or URL as given, or the id of a row
    path: str  # path or URL of the recording, or the data set that holds it
    target: str  # name, without suffix, of a file written about it; may hold folders
    row: int | None = None  # in the data set `path`
    part: int = 0  # of the recordings of that row
    subset: str | None = None  # of the data set `path`
    table: str | None = None  # the data set whose row it is, named by its id; None: a file
    duration: float | None = None  # seconds, about, where a row or a header says so

    @property
    def key(self) -> tuple[str, str]:
        """What tells the recording from others in an output: its data set, "" for a file, and its name."""
        return self.table or "", self.name


def find_jobs(sources: Sequence[str], subset: str | None = None) -> tuple[list[Job], dict[str, str]]:
    """Every recording of the sources once, in their order, without opening any of the recordings.

    Args:
        sources: audio files, URLs, folders (searched below for audio files, sorted; or holding a data set), data sets
            (`.jsonl`, `.json`, `.csv`, `.parquet`, a folder that `save_to_disk` wrote, or a Hub id: `owner/name`,
            `owner/name:split`, `owner/name@revision:split`).
        subset: name of the subset ("configuration") of data sets on the Hub.

    Returns:
        The jobs, and what is wrong with sources that gave none.

    Raises:
        ValueError: two rows of a data set have the same id, or `subset` is given without a data set on the Hub.
    """
    jobs: dict[tuple[str, str], Job] = {}
    errors: dict[str, str] = {}
    for source in sources:
        try:
            found = list(_jobs_of(source, subset))
        except Exception as error:  # whatever libraries raise, the others are read all the same
            errors[source] = reason(error)
            continue
        for job in found:
            key = (_absolute(job.table), job.name) if job.table else ("", _absolute(job.name))
            if job.table and key in jobs:
                raise ValueError(f"two rows of {job.table} have the id {job.name!r}; make them differ")
            jobs.setdefault(key, job)
    if subset is not None and not errors and not any(job.subset for job in jobs.values()):
        raise ValueError(f"--subset {subset} is for data sets on the Hub, and none is given; leave it out")
    return _with_targets(list(jobs.values()), sources), errors


def with_duration(job: Job) -> Job:
    """The job with the length that the header of its file tells, or about it; unchanged where none does."""
    if job.duration is not None or job.row is not None or URL.match(job.path):
        return job
    try:
        if job.path.lower().endswith(".mp3"):  # often without a length: all of it would be searched for one
            return replace(job, duration=os.path.getsize(job.path) / MP3_BYTES_PER_S)
        return replace(job, duration=soundfile.info(job.path).duration)
    except (soundfile.SoundFileError, OSError, ValueError):
        return job


def reason(error: Exception) -> str:
    """What an error says; those of libraries mean more with their kind."""
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """Sorted by length, so that a batch wastes little on padding and too large a one fails at once; unknown last."""
    return sorted(jobs, key=lambda job: -(job.duration or 0.0))


def recording(job: Job) -> Any:
    """What `load_audio` takes: a path, a URL, or `{"bytes", "path"}`."""
    if job.row is None:
        return job.path
    table, column = _open_table(job.path, job.subset)
    return _recordings(table[job.row][column], _folder_of(job.path))[job.part]


def _jobs_of(source: str, subset: str | None) -> Iterator[Job]:
    path = Path(source)
    if URL.match(source):
        yield Job(source, source, _plain(unquote(urlsplit(source).path.rpartition("/")[2])))
    elif path.is_dir() and not any((path / name).is_file() for name in SAVED_DATASET):
        yield from _folder_jobs(source)
    elif path.is_dir() or (path.is_file() and path.suffix in TABLE_SUFFIXES):
        yield from _table_jobs(source)
    elif _is_hub_id(source):
        try:
            yield from _table_jobs(source, subset)
        except Exception as error:  # the Hub's client raises what it likes
            raise ValueError(f"{source} is no file or folder here, and no data set on the Hub ({error})") from error
    else:
        yield Job(source, source, "")


def _folder_jobs(folder: str) -> Iterator[Job]:
    found = tables = 0
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            # Hidden files are left by other systems, such as the `._name.wav` of macOS.
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                found += 1
                path = os.path.join(root, name)
                yield Job(path, path, "")
    if not found:
        for table in sorted(Path(folder).iterdir()):
            if table.suffix in TABLE_SUFFIXES:
                tables += 1
                yield from _table_jobs(str(table))
    if not found + tables:
        raise ValueError(
            f"{folder} holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))}) at any depth, and no data set "
            f"({', '.join(TABLE_SUFFIXES)})"
        )


def _table_jobs(source: str, subset: str | None = None) -> Iterator[Job]:
    from soundwave.training.data import READERS

    path = Path(source)
    if path.suffix in READERS and path.is_file():  # recordings are paths: the data set is not needed again
        for number, (where, row) in enumerate(READERS[path.suffix](path)):
            column = next((name for name in AUDIO_COLUMNS if isinstance(row, dict) and name in row), None)
            if column is None:
                raise ValueError(f"{where}: no field {' or '.join(AUDIO_COLUMNS)}; expected a recording there")
            for name, audio in _named(row, number, path, _recordings(row[column], path.parent)):
                yield Job(name, audio.get("path") or "", _plain(name), table=source, duration=_seconds(row))
        return
    table, column = _open_table(source, subset)
    fields = [name for name in ("id", "duration_s") if name in table.column_names]
    counts = _recordings_per_row(table, column)
    rows = table.select_columns(fields) if fields else [{}] * len(counts)
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        for name, part in _named(row, number, path, range(count)):
            yield Job(name, source, _plain(name), number, part, subset, source, _seconds(row))


def _named(row: dict[str, Any], number: int, path: Path, recordings: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """A name for each recording of a row: its id, and a number if there are several."""
    name = str(row["id"]) if row.get("id") is not None else f"{path.stem}:{number}"
    for part, audio in enumerate(recordings):
        yield (name if len(recordings) == 1 else f"{name}#{part}"), audio


def _seconds(row: dict[str, Any]) -> float | None:
    """The length that a row tells; only the order of work depends on it, so a wrong one is none."""
    try:
        return float(row["duration_s"])
    except (KeyError, TypeError, ValueError):
        return None


@lru_cache(maxsize=4)
def _open_table(source: str, subset: str | None) -> tuple[Any, str]:
    """A data set that stays on disk, with its recordings undecoded, and the name of their column."""
    from datasets import (
        Audio,
        Dataset,
        DatasetDict,
        List,
        get_dataset_split_names,
        load_dataset,
        load_from_disk,
    )

    path = Path(source)
    if path.is_dir():
        table = load_from_disk(source)
    elif path.is_file():
        table = Dataset.from_parquet(source)
    else:
        name, _, split = source.partition(":")
        name, _, revision = name.partition("@")
        commit = revision or None
        if not split:
            split, *others = get_dataset_split_names(name, subset, revision=commit)
            if others:
                raise ValueError(f"it has the splits {', '.join((split, *others))}; name one: {source}:{split}")
        table = load_dataset(name, subset, split=split, revision=commit)
    if isinstance(table, DatasetDict):
        raise ValueError(f"{source} holds the splits {', '.join(table)}; give the folder of one of them")
    audio_columns = [name for name, feature in table.features.items() if isinstance(feature, Audio)]
    column = next((name for name in (*audio_columns, *AUDIO_COLUMNS) if name in table.column_names), None)
    if column is None:
        raise ValueError(
            f"{source} has the columns {', '.join(table.column_names)}, none of them {' or '.join(AUDIO_COLUMNS)}"
        )
    # Reading a row decodes all its columns: those of other recordings too.
    table = table.select_columns([name for name in ("id", "duration_s", column) if name in table.column_names])
    feature = table.features[column]
    if isinstance(feature, Audio):
        table = table.cast_column(column, Audio(decode=False))
    elif isinstance(feature, List) and isinstance(feature.feature, Audio):
        table = table.cast_column(column, List(Audio(decode=False)))
    return table, column


def _recordings_per_row(table: Any, column: str) -> list[int]:
    """How many recordings each row has, without reading any."""
    import pyarrow as pa
    import pyarrow.compute as pc

    counts: list[int] = []
    for batch in table.select_columns([column]).with_format("arrow").iter(1000):
        values = batch.column(column)
        is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        counts += (
            pc.fill_null(pc.list_value_length(values), 0).to_pylist()
            if is_list
            else [int(valid) for valid in pc.is_valid(values).to_pylist()]
        )
    return counts


def _recordings(audio: Any, folder: Path) -> list[dict[str, Any]]:
    """None, one or several recordings of a row; relative paths start from the folder of the data set."""
    from soundwave.training.data import recordings

    found = []
    for one in recordings({"audio": audio}):
        path = one.get("path")
        if path and one.get("bytes") is None and not URL.match(path):
            one = {"path": str(folder / path), "bytes": None}
        found.append(one)
    return found


def _folder_of(source: str) -> Path:
    path = Path(source)
    return path if path.is_dir() else path.parent


def _is_hub_id(source: str) -> bool:
    name = source.partition(":")[0].partition("@")[0]
    return (
        name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and Path(name).suffix.lower() not in (*AUDIO_SUFFIXES, *TABLE_SUFFIXES)
    )


def _absolute(name: str) -> str:
    return name if URL.match(name) else os.path.abspath(name)


def _plain(name: str) -> str:
    """A name fit for a file in a folder of ours: an id may hold anything, `../` too, or nothing."""
    plain = re.sub(r"[^\w.-]", "_", name)[-50:]  # characters, of up to four bytes each
    return plain if plain.strip(".") else f"_{plain}"


def _with_targets(jobs: list[Job], sources: Sequence[str]) -> list[Job]:
    """Targets that mirror the tree of the inputs, from their common folder on; no two are the same.

    Files that differ in their suffix alone keep it; what is still the same gets a number.
    """
    folders = [
        os.path.abspath(source if os.path.isdir(source) else os.path.dirname(source))
        for source in sources
        if not URL.match(source)
    ]
    base = os.path.commonpath(folders) if folders else ""
    full = [
        job.target if job.table or URL.match(job.path) else os.path.relpath(os.path.abspath(job.path), base)
        for job in jobs
    ]
    short = [target if job.table else os.path.splitext(target)[0] for job, target in zip(jobs, full, strict=True)]
    times = Counter(map(str.casefold, short))
    taken: Counter[str] = Counter()
    named = []
    for job, long, brief in zip(jobs, full, short, strict=True):
        target = brief if times[brief.casefold()] == 1 else long
        while taken[target.casefold()]:  # also when a number makes it the name of another
            taken[target.casefold()] += 1
            target = f"{target}-{taken[target.casefold()]}"
        taken[target.casefold()] += 1
        named.append(replace(job, target=target))
    return named
