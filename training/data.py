"""Rows from anywhere: files, folders, the Hub or a `datasets.Dataset`, checked and brought to one schema.

A row is one training or evaluation example:

    id, task, instruction, answer, language, source: str    audio: one recording, a list of them, or null
    transcript: str or null (a list beside a list of recordings)    duration_s: float or null
    messages: a conversation in place of instruction and answer

Recordings are never decoded here: they stay `{"path", "bytes"}`, which needs no FFmpeg.
"""

import csv
import difflib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Audio,
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from soundwave.training.errors import DataError

logger = logging.getLogger(__name__)

RECORDING = {"bytes": Value("binary"), "path": Value("string")}  # how Arrow stores an Audio column
TURN = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
TEXT_FIELDS = ("id", "task", "instruction", "answer", "language", "source")
FIELDS = ("id", "audio", "task", "instruction", "answer", "transcript", "language", "source", "duration_s", "messages")


def load_rows(source: Any, root: str | Path = "") -> Dataset:
    """One dataset of checked rows, in the order of the source.

    Args:
        source: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder of them or one written by `save_to_disk`, a
            Hub id (`owner/name`, `owner/name:split`, `owner/name@revision:split`), a `datasets.Dataset`, or a list of
            such sources.
        root: folder that relative paths of sources start from.

    Raises:
        DataError: naming the file, line and field that is wrong.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise DataError("no data source was given; name at least one file, folder or Hub id.")
        return concatenate_rows([load_rows(one, root) for one in source])
    if isinstance(source, Dataset):
        return _from_table(source, "the given dataset", Path(root))
    path = Path(root) / str(source)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    # Names, revisions and splits may hold a dot: only the suffixes that are read here mean a file.
    name = str(source).partition(":")[0].partition("@")[0]
    if name.count("/") == 1 and path.suffix not in SUFFIXES and not name.startswith((".", "/")):
        return _from_hub(str(source))
    raise DataError(f"the data source {path} does not exist; give a file, a folder or a Hub id (owner/name).")


def concatenate_rows(parts: Sequence[Dataset]) -> Dataset:
    """One dataset of several; columns that hold lists in one part become lists in all."""
    if any(isinstance(part.features["audio"], List) for part in parts):
        parts = [part if isinstance(part.features["audio"], List) else _as_lists(part) for part in parts]
    return parts[0] if len(parts) == 1 else concatenate_datasets(list(parts))


def with_audio(rows: Dataset) -> Dataset:
    """The rows that have a recording: stage I has no LLM that could learn from the others; says how many it leaves.

    Raises:
        DataError: when there is none.
    """
    chunks = rows.select_columns(["audio"]).with_format("arrow").iter(1000)
    spoken = np.concatenate([np.zeros(0, bool), *(chunk.column("audio").is_valid().to_numpy() for chunk in chunks)])
    if not spoken.any():
        raise DataError(f"none of the {len(rows)} rows has audio, and this stage learns from recordings only.")
    if spoken.all():
        return rows
    logger.warning("%d of %d rows have no audio; this stage leaves them out.", len(rows) - spoken.sum(), len(rows))
    return rows.select(np.flatnonzero(spoken))


def recordings(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The recordings of a row, in order: none, one or several `{"path", "bytes"}`."""
    audio = row.get("audio")
    if audio is None:
        return []
    items = audio if isinstance(audio, (list, tuple)) else [audio]
    return [item if isinstance(item, dict) else {"path": str(item), "bytes": None} for item in items]


def transcripts(row: dict[str, Any]) -> list[str | None]:
    """The transcript of each recording of a row; `None` where there is none."""
    n_audios, transcript = len(recordings(row)), row.get("transcript")
    if isinstance(transcript, (list, tuple)):
        return list(transcript)
    return [transcript] if n_audios == 1 else [None] * n_audios


def _from_folder(folder: Path) -> Dataset:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        loaded = load_from_disk(str(folder))
        if isinstance(loaded, DatasetDict):
            raise DataError(f"{folder} holds the splits {', '.join(loaded)}; give the folder of one of them.")
        return _from_table(loaded, str(folder), folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no .jsonl, .json, .csv or .parquet file.")
    return concatenate_rows([_from_file(file) for file in files])


def _from_file(path: Path) -> Dataset:
    if path.suffix == ".parquet":
        return _from_table(Dataset.from_parquet(str(path)), str(path), path.parent)
    if path.suffix not in READERS:
        raise DataError(f"{path} is of the unknown kind {path.suffix!r}; expected .jsonl, .json, .csv or .parquet.")
    rows = [checked_row(row, where, path) for where, row in READERS[path.suffix](path)]
    if not rows:
        raise DataError(f"{path} holds no rows.")
    return _to_dataset(rows)


def _from_hub(source: str) -> Dataset:
    name, _, split = source.partition(":")
    name, _, revision = name.partition("@")
    dataset = load_dataset(name, split=split or "train", revision=revision or None)
    return _from_table(dataset, source, Path())


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})."
                    ) from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}, expected a list of rows.")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: as many values as the header has columns ({len(row)}) are expected.")
            yield where, {key: value or None for key, value in row.items()}


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
SUFFIXES = (*READERS, ".parquet")


def checked_row(row: Any, where: str, path: Path, to_learn: bool = True) -> dict[str, Any]:
    """A row with every field of the schema, absolute audio paths, and recordings taken out of its messages."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, expected an object with the fields {', '.join(FIELDS)}.")
    check_names(row.keys(), where)
    out = {name: row.get(name) for name in FIELDS}
    out["id"] = (
        str(out["id"]) if out["id"] is not None else where.replace(str(path), path.stem).replace(", line ", ":")
    )
    for name in TEXT_FIELDS:
        if out[name] is not None and not isinstance(out[name], str):
            raise DataError(f"{where}, field {name!r}: {out[name]!r}, expected text.")
    if not out["task"]:
        raise DataError(f"{where}, field 'task': missing; name the task, e.g. asr, st or text_qa.")
    if out["duration_s"] is not None:
        try:
            out["duration_s"] = float(out["duration_s"])
        except (TypeError, ValueError):
            raise DataError(f"{where}, field 'duration_s': {out['duration_s']!r}, expected seconds.") from None
    if out["messages"] is not None:
        out["messages"], spoken = _checked_messages(out["messages"], where)
        if spoken:
            if out["audio"] is not None:
                raise DataError(
                    f"{where}, field 'audio': the messages name their recordings themselves; leave it out."
                )
            out["audio"] = spoken
    elif to_learn and out["answer"] is None and out["transcript"] is None:
        raise DataError(f"{where}, field 'answer': missing, and so is the transcript; there is nothing to learn.")
    folder = path.parent
    audio = out["audio"]
    if isinstance(audio, list):
        out["audio"] = [_recording(item, where, folder) for item in audio]
    elif audio is not None:
        out["audio"] = _recording(audio, where, folder)
    _check_transcript(out, where)
    return out


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse a name that looks like a misspelt field; other surplus ones are nobody's business."""
    given = set(names)
    for name in given - set(FIELDS):
        near = difflib.get_close_matches(name, [field for field in FIELDS if field not in given], n=1, cutoff=0.8)
        if near:
            raise DataError(f"{where}, field {name!r}: unknown; did you mean {near[0]!r}?")


def _check_transcript(row: dict[str, Any], where: str) -> None:
    audio, transcript = row["audio"], row["transcript"]
    if isinstance(audio, list) and isinstance(transcript, str):
        raise DataError(
            f"{where}, field 'transcript': one text for {len(audio)} recordings; expected a list, one each."
        )
    if isinstance(transcript, list):
        n_audios = len(audio) if isinstance(audio, list) else int(audio is not None)
        if len(transcript) != n_audios or not isinstance(audio, list):
            raise DataError(f"{where}, field 'transcript': {len(transcript)} texts for {n_audios} recordings.")
        if not all(text is None or isinstance(text, str) for text in transcript):
            raise DataError(f"{where}, field 'transcript': {transcript!r}, expected texts or nulls.")
    elif transcript is not None and not isinstance(transcript, str):
        raise DataError(f"{where}, field 'transcript': {transcript!r}, expected text, a list of texts or null.")
    elif transcript is not None and audio is None:
        raise DataError(f"{where}, field 'transcript': given, but the row has no audio.")


def _recording(audio: Any, where: str, folder: Path) -> dict[str, Any]:
    """A path or `{"path", "bytes"}`, with the path made absolute from the file's folder; URLs stay."""
    if isinstance(audio, str):
        audio = {"path": audio, "bytes": None}
    if not isinstance(audio, dict) or not (audio.get("path") or audio.get("bytes")):
        raise DataError(
            f"{where}, field 'audio': {audio!r}, expected a path, {{'path' or 'bytes': ...}}, a list, or null."
        )
    path = audio.get("path")
    if path and audio.get("bytes") is None and "://" not in path and not path.startswith("data:"):
        path = str((folder / path).absolute())
    return {"path": path, "bytes": audio.get("bytes")}


def _checked_messages(messages: Any, where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Turns with content lists, and the recordings they named, in order."""
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise DataError(f"{where}, field 'messages': expected a list of turns {{'role', 'content'}}.")
    turns, spoken = [], []
    for turn in messages:
        role, content = turn.get("role"), turn.get("content")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role not in ("system", "user", "assistant") or not isinstance(content, list):
            raise DataError(
                f"{where}, field 'messages': the turn {turn!r} needs a role (system, user, assistant) and content."
            )
        items = []
        for item in content:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "audio":
                named = next((item[key] for key in ("path", "url", "audio") if item.get(key)), None)
                spoken += [] if named is None else [named]
                items.append({"type": "audio", "text": None})
            elif kind == "text" and isinstance(item.get("text"), str):
                items.append({"type": "text", "text": item["text"]})
            else:
                raise DataError(
                    f"{where}, field 'messages': {item!r}, expected an item of type audio, or text with its text."
                )
        turns.append({"role": role, "content": items})
    if turns[-1]["role"] != "assistant":
        raise DataError(
            f"{where}, field 'messages': the last turn is the {turns[-1]['role']}'s, expected the assistant's."
        )
    return turns, spoken


def _features(lists: bool) -> Features:
    text, audio = Value("string"), Audio(decode=False)
    types = {"audio": List(audio) if lists else audio, "transcript": List(text) if lists else text}
    types |= {"duration_s": Value("float64"), "messages": List(TURN)}
    return Features({name: types.get(name, text) for name in FIELDS})


def _to_dataset(rows: list[dict[str, Any]]) -> Dataset:
    lists = any(isinstance(row["audio"], list) for row in rows)
    if lists:
        for row in rows:
            row["transcript"] = transcripts(row) if row["audio"] is not None else None
            row["audio"] = recordings(row) if row["audio"] is not None else None
    features = _features(lists)
    # Built as plain structs and relabelled: encoding through the Audio feature would ask for FFmpeg.
    plain = Features({**features, "audio": List(RECORDING) if lists else RECORDING})
    columns = {name: [row[name] for row in rows] for name in FIELDS}
    return Dataset(Dataset.from_dict(columns, features=plain).data, info=_info(features), fingerprint=None)


def _info(features: Features) -> Any:
    from datasets import DatasetInfo

    return DatasetInfo(features=features)


def _as_lists(part: Dataset) -> Dataset:
    def wrap(batch: dict[str, list]) -> dict[str, list]:
        pairs = list(zip(batch["audio"], batch["transcript"], strict=True))
        return {
            "audio": [None if audio is None else [audio] for audio, _ in pairs],
            "transcript": [None if audio is None else [text] for audio, text in pairs],
        }

    plain = part.cast_column("audio", RECORDING)
    target = Features({**_features(True), "audio": List(RECORDING)})
    return plain.map(wrap, batched=True, features=target).cast_column("audio", List(Audio(decode=False)))


def _from_table(dataset: Dataset, name: str, folder: Path) -> Dataset:
    """Rows of an Arrow table, left where they are: checked and completed; rewritten only to resolve relative paths."""
    columns = dataset.column_names
    check_names(columns, name)
    for needed, others in (("task", ()), ("answer", ("messages", "transcript"))):
        if needed not in columns and not set(others) & set(columns):
            raise DataError(f"{name}: the column {needed!r} is missing; it has {', '.join(columns)}.")
    if "messages" in columns:  # conversations are rewritten row by row
        return _to_dataset(
            [checked_row(row, f"{name}, row {k}", folder / "row") for k, row in enumerate(_plain(dataset))]
        )
    moved = False
    for k, row in enumerate(rows_without_bytes(dataset)):
        moved |= checked_row(row, f"{name}, row {k}", folder / "row")["audio"] != row.get("audio")
    lists = "audio" in columns and isinstance(dataset.features["audio"], List)
    target = _features(lists)
    if moved:
        plain = Features({**dataset.features, "audio": List(RECORDING) if lists else RECORDING})

        def resolve(row: dict[str, Any]) -> dict[str, Any]:
            audio = row["audio"]
            if isinstance(audio, list):
                return {"audio": [_recording(item, name, folder) for item in audio]}
            return {"audio": audio and _recording(audio, name, folder)}

        dataset = _plain(dataset).map(resolve, features=plain)
    for missing in (field for field in FIELDS if field not in columns):
        if missing == "id":
            dataset = dataset.add_column("id", [f"{Path(name).stem}:{k}" for k in range(len(dataset))])
        else:
            dataset = dataset.add_column(missing, [None] * len(dataset), feature=target[missing])
    return dataset.select_columns(list(FIELDS)).cast(target)


def rows_without_bytes(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a table with the number of bytes in place of a recording's bytes, which may be gigabytes."""
    columns = [name for name in dataset.column_names if name in FIELDS]
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        values = {name: table.column(name).combine_chunks() for name in columns}
        lists = {name: _sizes(array) if name == "audio" else array.to_pylist() for name, array in values.items()}
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*lists.values(), strict=True))


def _sizes(audio: pa.Array) -> list[Any]:
    """A column of recordings, (lists of) paths or structs, with the number of bytes in place of the bytes."""
    if pa.types.is_list(audio.type) or pa.types.is_large_list(audio.type):
        items = iter(_sizes(audio.flatten()))
        lengths = pc.list_value_length(audio).to_pylist()
        return [None if length is None else [next(items) for _ in range(length)] for length in lengths]
    names = {field.name for field in audio.type} if pa.types.is_struct(audio.type) else set()
    if not {"bytes", "path"} <= names:
        return audio.to_pylist()
    sizes = pc.binary_length(pc.struct_field(audio, "bytes")).to_pylist()
    pairs = zip(sizes, pc.struct_field(audio, "path").to_pylist(), audio.is_valid().to_pylist(), strict=True)
    return [{"bytes": size, "path": path} if valid else None for size, path, valid in pairs]


def _plain(dataset: Dataset) -> Dataset:
    """The dataset with recordings undecoded."""
    audio = dataset.features.get("audio")
    if isinstance(audio, Audio):
        return dataset.cast_column("audio", Audio(decode=False))
    if isinstance(audio, List) and isinstance(audio.feature, Audio):
        return dataset.cast_column("audio", List(Audio(decode=False)))
    return dataset
