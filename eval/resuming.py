"""A folder of answers whose run was killed at any moment, and by how many processes: what stays, and what may go on.

Beside ``answers.jsonl`` stands ``answers.settings.json``: by test set, what its answers depend on. A test set is
finished when it has an entry in ``results.json``. Several processes write a part each (``answers.jsonl.rank0``, ...),
which are brought into one file when all are done, or by the next run.
"""

import fcntl
import glob
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soundwave.eval.logs import (
    ANSWERS_FILE,
    SETTINGS_FILE,
    AnswerLog,
    line_of,
    read_answers,
    read_rows,
    read_settings,
    replace_file,
)
from soundwave.eval.results import forget_result, read_result

Row = dict[str, Any]
Folder = str | os.PathLike[str]
PATIENCE_S = 2  # a run that was killed may take a moment to go


@contextmanager
def claim(folder: Folder) -> Iterator[None]:
    """Keep a folder of answers to one run: two at once would undo each other's work.

    Raises:
        ValueError: If another run has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    patience = time.monotonic() + PATIENCE_S
    try:
        while not _locked(descriptor):
            if time.monotonic() > patience:
                raise ValueError(f"another run is writing to {folder}; wait for its end, or give another --output")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


class PartLog(AnswerLog):
    """What one of several processes answers, in a file of its own."""

    def __init__(self, folder: Folder, name: str, rank: int) -> None:
        self.file_name = f"{ANSWERS_FILE}.rank{rank}"
        super().__init__(folder, name)


def begin(
    folder: Folder, name: str, settings: Mapping[str, Any], overwrite: bool = False, retry_failed: bool = False
) -> tuple[list[Row], bool]:
    """Make a folder ready for the answers of a test set, whatever state it was left in.

    Args:
        folder: Of ``answers.jsonl`` and ``results.json``.
        name: Of the test set.
        settings: What the answers depend on.
        overwrite: Start anew.
        retry_failed: Take a finished test set with failures for an unfinished one.

    Returns:
        The rows that stay, and whether the test set is finished. Of an unfinished one those with an error do not stay:
        an endpoint may be back, a file repaired.

    Raises:
        ValueError: If the answers there were made with other settings: says which.
    """
    merge_parts(folder)
    path = Path(folder) / SETTINGS_FILE
    made_with = read_settings(folder)
    rows = [row for row in read_answers(folder) if row["name"] == name]
    entry = read_result(folder, name)
    finished = entry is not None and entry["dataset"]["rows"] == len(rows)  # without its answers it proves nothing
    if retry_failed and any(row["error"] is not None for row in rows):
        finished = False
    now = json.loads(json.dumps(settings))
    if rows and not overwrite:
        _check_same(folder, name, made_with.get(name), now, finished)
        if finished:
            return rows, True
    forget_result(folder, name)
    log = AnswerLog(folder, name, keep=lambda row: not overwrite and row["error"] is None)
    replace_file(path, json.dumps(made_with | {name: now}, indent=1, ensure_ascii=False) + "\n")
    return log.rows, False


def merge_parts(folder: Folder) -> None:
    """Bring what several processes wrote into ``answers.jsonl``; every answer once, whenever this was interrupted."""
    path = Path(folder) / ANSWERS_FILE
    parts = [Path(name) for name in sorted(glob.glob(f"{glob.escape(str(path))}.rank*"))]
    rows: dict[tuple[str, str], Row] = {}
    for row in (row for part in [path, *parts] for row in read_rows(part)):
        key = row["name"], row["id"]
        if key not in rows or rows[key]["error"] is not None:  # an answer counts more than an error
            rows[key] = row
    if parts:
        replace_file(path, "".join(map(line_of, rows.values())))
    for part in parts:
        part.unlink()


def _check_same(folder: Folder, name: str, made_with: Row | None, settings: Row, finished: bool) -> None:
    where = f"{folder} holds {'finished' if finished else 'unfinished'} answers of {name!r}"
    if made_with is None:
        raise ValueError(f"{where}, but {SETTINGS_FILE} does not say how they were made; --overwrite starts anew")
    before, now = _flat(made_with), _flat(settings)
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    if changed:
        what = ", ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise ValueError(
            f"{where} that were made with other settings ({what}); give another --output, or --overwrite to start anew"
        )


def _flat(settings: Row, prefix: str = "") -> Row:
    flat: Row = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


__all__ = ["SETTINGS_FILE", "PartLog", "begin", "claim", "merge_parts"]
